"""U-Net: residual blocks down and up again, with skips, for images of any size and number of channels."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from inkdrop.core.cond import Cond
from inkdrop.errors import BadArgument, BadShape
from inkdrop.nets.blocks import Down, ResBlock, SelfAttention, Up, norm, zeroed
from inkdrop.nets.embed import Context, Wave, check_input

__all__ = ["Stage", "UNet", "unet", "unet_cifar10", "unet_digits", "unet_mnist", "unet_tiny"]


class Stage(nn.Module):
    """One residual block, and self-attention after it where the level has it."""

    def __init__(self, block: ResBlock, attention: SelfAttention | None) -> None:
        super().__init__()
        self.block = block
        self.attention = attention

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        """x (B, C, H, W), context (B, D) -> (B, C', H, W)."""
        h: Tensor = self.block(x, context)
        return h if self.attention is None else self.attention(h)


class UNet(nn.Module):
    """The module that `unet` makes: its parts in the order in which they run.

    Args:
        shape: (C, H, W) that it was made for; other sizes run too, other C do not.
        learned_variance: whether the output has 2·C channels.
        patch: the side of the squares of pixels that are one pixel inside, in pixels.
        context: clock and class -> (B, D).
        stem: the first convolution, (B, C·patch², h, w) -> (B, width, h, w).
        down: stages and `Down`s; each one's output is a skip, and so is the stem's.
        middle: stages at the smallest size.
        up: stages, each taking one skip, and `Up`s.
        head: norm, silu and the last convolution.
    """

    def __init__(
        self,
        shape: tuple[int, int, int],
        learned_variance: bool,
        patch: int,
        context: Context,
        stem: nn.Module,
        down: Sequence[nn.Module],
        middle: Sequence[nn.Module],
        up: Sequence[nn.Module],
        head: nn.Module,
    ) -> None:
        super().__init__()
        self.shape = shape
        self.learned_variance = learned_variance
        self.patch = patch
        self.context = context
        self.stem = stem
        self.down = nn.ModuleList(down)
        self.middle = nn.ModuleList(middle)
        self.up = nn.ModuleList(up)
        self.head = head

    @property
    def classes(self) -> int:
        """How many classes the net takes; 0 if it takes none."""
        return 0 if self.context.label is None else self.context.label.classes

    def forward(self, x: Tensor, clock: Tensor, cond: Cond | None = None) -> Tensor:
        """The net's answer.

        Args:
            x: (B, C, H, W).
            clock: (B,) float32 or float64, the time in the unit that the net was trained with.
            cond: a label for each row, or None for null in every row.

        Returns:
            (B, C, H, W); with learned variance (B, 2·C, H, W), whose second half is 2·v − 1, v the fraction in
            [0, 1] between log beta-tilde and log beta, not clamped (Improved DDPM, eq. 15).

        Raises:
            BadShape: x has other than C channels, or x, clock and cond differ in rows.
            BadArgument: cond has a field that this net does not take, or a label out of range.
        """
        check_input(x, clock, self.shape, any_size=True)
        context = self.context(clock, cond)
        high, wide = x.shape[-2:]
        x = functional.pad(x, (0, -wide % self.patch, 0, -high % self.patch))
        h = self.stem(functional.pixel_unshuffle(x, self.patch))
        skips = [h]
        for part in self.down:
            h = part(h) if isinstance(part, Down) else part(h, context)
            skips.append(h)
        for part in self.middle:
            h = part(h, context)
        for part in self.up:
            if isinstance(part, Up):
                h = part(h, skips[-1].shape[-2:])
            else:
                h = part(torch.cat([h, skips.pop()], dim=1), context)
        return functional.pixel_shuffle(self.head(h), self.patch)[..., :high, :wide]


def unet(
    shape: tuple[int, ...],
    *,
    classes: int = 0,
    width: int = 64,
    multipliers: tuple[int, ...] = (1, 2, 2),
    blocks: int = 2,
    attention: tuple[int, ...] = (),
    middle_attention: bool = True,
    head_width: int | None = None,
    dropout: float = 0.0,
    scale_shift: bool = True,
    learned_variance: bool = False,
    patch: int = 1,
    embedding: Wave = "sinusoidal",
    fourier_scale: float | None = None,
) -> UNet:
    """A U-Net for images of any size and number of channels.

    Level i has width·multipliers[i] channels at 1/2^i of the size (rounded up): `blocks` residual blocks on the way
    down and blocks + 1 on the way up. The last layer of every residual branch and of the net starts at zero.

    Args:
        shape: (C, H, W) of one image.
        classes: how many classes; 0 for a net that takes none.
        width: channels of level 0; even, at least 4. The context has 4·width numbers.
        multipliers: the channels of each level over width, each at least 1.
        blocks: residual blocks a level, at least 1.
        attention: the levels (0 is full size) whose blocks are followed by self-attention.
        middle_attention: self-attention between the two middle blocks.
        head_width: channels a head of attention; None for a single head.
        dropout: the probability of dropping a value inside a residual block, in [0, 1).
        scale_shift: time and class scale and shift (ADM) rather than are added (DDPM).
        learned_variance: 2·C channels out, the second half for the variance (Improved DDPM).
        patch: the side in pixels of the squares that the net sees as one pixel of C·patch² channels; 1 for pixels.
        embedding: of the time, "sinusoidal" for any clock or "fourier" for a clock of order 1.
        fourier_scale: the standard deviation of the Fourier frequencies, in cycles a unit of clock; 16 if None.

    Raises:
        BadShape: shape is not (C, H, W).
        BadArgument: a knob is out of its range.

    Reference: Ho et al. 2020, appendix B; Dhariwal & Nichol 2021, §3; Nichol & Dhariwal 2021, §3.1.
    """
    image = _image(shape)
    _check(width, multipliers, blocks, attention, dropout, patch)
    context = Context(width, 4 * width, classes=classes, embedding=embedding, fourier_scale=fourier_scale)

    def stage(inp: int, out: int, attend: bool) -> Stage:
        block = ResBlock(inp, out, 4 * width, dropout=dropout, scale_shift=scale_shift)
        return Stage(block, SelfAttention(out, head_width=head_width) if attend else None)

    widths = [width * m for m in multipliers]
    down, skips = _down(stage, widths, blocks, attention)
    middle = [stage(widths[-1], widths[-1], middle_attention), stage(widths[-1], widths[-1], False)]
    up = _up(stage, widths, blocks, attention, skips)
    stem = nn.Conv2d(image[0] * patch**2, width, 3, padding=1)
    out = image[0] * patch**2 * (2 if learned_variance else 1)
    head = nn.Sequential(norm(widths[0]), nn.SiLU(), zeroed(nn.Conv2d(widths[0], out, 3, padding=1)))
    return UNet(image, learned_variance, patch, context, stem, down, middle, up, head)


def unet_tiny(
    shape: tuple[int, ...], *, classes: int = 0, width: int = 16, dropout: float = 0.0, learned_variance: bool = False
) -> UNet:
    """A two-level U-Net of 0.2 M parameters that sees 2×2 pixels as one, for drawn shapes and first tries."""
    return unet(
        shape,
        classes=classes,
        width=width,
        multipliers=(1, 2),
        blocks=1,
        dropout=dropout,
        learned_variance=learned_variance,
        patch=2,
    )


def unet_digits(
    shape: tuple[int, ...], *, classes: int = 0, width: int = 16, dropout: float = 0.0, learned_variance: bool = False
) -> UNet:
    """A two-level U-Net of 0.2 M parameters for 8×8 digits, trained in about a minute on two CPU cores."""
    return unet(
        shape,
        classes=classes,
        width=width,
        multipliers=(1, 2),
        blocks=1,
        dropout=dropout,
        learned_variance=learned_variance,
    )


def unet_mnist(
    shape: tuple[int, ...], *, classes: int = 0, width: int = 24, dropout: float = 0.0, learned_variance: bool = False
) -> UNet:
    """A three-level U-Net of 1.5 M parameters that sees 2×2 pixels as one, for 28×28 digits on a CPU."""
    return unet(
        shape,
        classes=classes,
        width=width,
        multipliers=(1, 2, 4),
        blocks=1,
        dropout=dropout,
        learned_variance=learned_variance,
        patch=2,
    )


def unet_cifar10(
    shape: tuple[int, ...], *, classes: int = 0, dropout: float = 0.1, learned_variance: bool = False
) -> UNet:
    """The CIFAR-10 net of DDPM: 35.7 M parameters, attention at half size, time added, a single head.

    Reference: Ho et al. 2020, appendix B.
    """
    return unet(
        shape,
        classes=classes,
        width=128,
        multipliers=(1, 2, 2, 2),
        attention=(1,),
        dropout=dropout,
        scale_shift=False,
        learned_variance=learned_variance,
    )


def _image(shape: tuple[int, ...]) -> tuple[int, int, int]:
    if len(shape) != 3 or min(shape) < 1:
        raise BadShape(f"unet shape: got {tuple(shape)}, need (C, H, W) of at least 1 each; try mlp for points")
    channels, high, wide = shape
    return channels, high, wide


def _check(
    width: int,
    multipliers: tuple[int, ...],
    blocks: int,
    attention: tuple[int, ...],
    dropout: float,
    patch: int,
) -> None:
    if width < 4 or width % 2:
        raise BadArgument(f"unet width: got {width}, need an even number of at least 4")
    if not multipliers or min(multipliers) < 1:
        raise BadArgument(f"unet multipliers: got {multipliers}, need at least one, each at least 1; try (1, 2, 2)")
    if blocks < 1:
        raise BadArgument(f"unet blocks: got {blocks}, need at least 1")
    for level in attention:
        if not 0 <= level < len(multipliers):
            raise BadArgument(f"unet attention: got level {level}, need 0 to {len(multipliers) - 1}; try attention=[]")
    if not 0 <= dropout < 1:
        raise BadArgument(f"unet dropout: got {dropout}, need at least 0 and below 1")
    if patch < 1:
        raise BadArgument(f"unet patch: got {patch}, need at least 1 pixel")


def _down(
    stage: Callable[[int, int, bool], Stage], widths: list[int], blocks: int, attention: tuple[int, ...]
) -> tuple[list[nn.Module], list[int]]:
    """The way down, and the channels of every skip, the stem's first."""
    parts: list[nn.Module] = []
    skips = [widths[0]]
    for level, out in enumerate(widths):
        for _ in range(blocks):
            parts.append(stage(skips[-1], out, level in attention))
            skips.append(out)
        if level < len(widths) - 1:
            parts.append(Down(out))
            skips.append(out)
    return parts, skips


def _up(
    stage: Callable[[int, int, bool], Stage],
    widths: list[int],
    blocks: int,
    attention: tuple[int, ...],
    skips: list[int],
) -> list[nn.Module]:
    """The way up; each stage takes one skip, the last first."""
    parts: list[nn.Module] = []
    inp, left = widths[-1], list(skips)
    for level in reversed(range(len(widths))):
        for _ in range(blocks + 1):
            parts.append(stage(inp + left.pop(), widths[level], level in attention))
            inp = widths[level]
        if level:
            parts.append(Up(inp))
    return parts
