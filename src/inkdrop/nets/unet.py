"""U-Net: residual blocks down and up again, with skips, for images of any size and number of channels."""

from __future__ import annotations

from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from inkdrop.core.cond import Cond
from inkdrop.errors import BadArgument, BadShape
from inkdrop.nets.blocks import EPS, Down, Up, norm, zeroed
from inkdrop.nets.convolve import convolve
from inkdrop.nets.embed import Context, Coordinates, ImageCondition, Wave, check_input
from inkdrop.nets.layout import Attending, Layout, Stage, Style
from inkdrop.nets.text import Text, Words

__all__ = ["Head", "UNet", "unet"]


class Head(nn.Sequential):
    """Norm, silu and the last convolution, which starts at zero: (B, C, H, W) -> (B, C', H, W)."""

    def __init__(self, first: nn.GroupNorm, last: nn.Conv2d) -> None:
        super().__init__(first, nn.SiLU(), zeroed(last))

    def forward(self, h: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C', H, W)."""
        return convolve(h, cast(nn.GroupNorm, self[0]), cast(nn.Conv2d, self[2]), training=self.training)


class UNet(nn.Module):
    """The module that `unet` makes: its parts in the order in which they run.

    Args:
        shape: (C, H, W) that it was made for; other sizes run too, other C do not.
        layout: what its stages are made of.
        context: clock, class and attributes -> (B, D).
        text: reads a condition's text; None for a net without.
        pooled: whether the mean of the words is added to the context.
        image: channels of the image that is joined to x; 0 for none.
        coordinates: channels that say where each pixel lies, joined to x; 0 for none.
        learned_variance: whether the output has 2·C channels.
        patch: the side of the squares of pixels that are one pixel inside, in pixels.
        checkpoint: forget what is inside stages in training, and compute it again for the gradient.
    """

    def __init__(
        self,
        shape: tuple[int, int, int],
        layout: Layout,
        context: Context,
        text: Text | None,
        pooled: bool,
        image: int,
        coordinates: int,
        learned_variance: bool,
        patch: int,
        checkpoint: bool,
    ) -> None:
        super().__init__()
        width, inp = layout.widths[0], (shape[0] + image + coordinates) * patch**2
        out = shape[0] * patch**2 * (2 if learned_variance else 1)
        self.shape, self.learned_variance, self.patch, self.checkpoint = shape, learned_variance, patch, checkpoint
        self.context, self.text = context, text
        if text is not None and not pooled and not layout.attending.cross:
            raise BadArgument("unet pooled: got false, and no level reads the text otherwise; try cross=1")
        self.pool = nn.Linear(text.width, layout.context) if text is not None and pooled else None
        self.image = ImageCondition(image) if image else None
        self.coordinates = Coordinates(coordinates) if coordinates else None
        down, skips = layout.down()
        middle, up = layout.middle(), layout.up(skips)
        self.stem = nn.Conv2d(inp, width, 3, padding=1)
        self.down, self.middle, self.up = nn.ModuleList(down), nn.ModuleList(middle), nn.ModuleList(up)
        last = norm(width, layout.style.norm_groups, layout.style.norm_eps)
        self.head = Head(last, nn.Conv2d(width, out, 3, padding=1))

    @property
    def classes(self) -> int:
        """How many classes the net takes; 0 if it takes none."""
        return self.context.classes

    def forward(self, x: Tensor, clock: Tensor, cond: Cond | None = None) -> Tensor:
        """The net's answer.

        Args:
            x: (B, C, H, W).
            clock: (B,) float32 or float64, the time in the unit that the net was trained with.
            cond: the conditions of each row, of the fields that it was made for; a field that is not there, or None,
                is null in every row.

        Returns:
            (B, C, H, W); with learned variance (B, 2·C, H, W), whose second half is 2·v − 1, v the fraction in
            [0, 1] between log beta-tilde and log beta, not clamped (Improved DDPM, eq. 15).

        Raises:
            BadShape: x has other than C channels, or x, clock and cond differ in rows.
            BadArgument: cond has a field that this net does not take, or a label or token out of range.
        """
        check_input(x, clock, self.shape, any_size=True)
        context, words = self.context(clock, cond), None
        if self.text is not None:
            words = self.text(cond, x.shape[0])
            context = context if self.pool is None else context + self.pool(words.pooled)
        if self.image is not None:
            x = torch.cat([x, self.image(cond, x)], dim=1)
        if self.coordinates is not None:
            x = torch.cat([x, self.coordinates(cond, x)], dim=1)
        if self.patch == 1:
            y: Tensor = self.head(self._body(self.stem(x), context, words))
            return y
        high, wide = x.shape[-2:]
        right, below = ((self.patch - side % self.patch) % self.patch for side in (wide, high))
        x = functional.pad(x, (0, right, 0, below)) if right or below else x
        h = self._body(self.stem(functional.pixel_unshuffle(x, self.patch)), context, words)
        return functional.pixel_shuffle(self.head(h), self.patch)[..., :high, :wide]

    def _body(self, h: Tensor, context: Tensor, words: Words | None) -> Tensor:
        """Down, through the middle and up again, (B, width, h, w) -> (B, width, h, w)."""
        skips = [h]
        for part in self.down:
            h = self._run(part, h, context, words)
            skips.append(h)
        for part in self.middle:
            h = self._run(part, h, context, words)
        for part in self.up:
            if isinstance(part, Stage):
                h = self._run(part, torch.cat([h, skips.pop()], dim=1), context, words)
            elif isinstance(part, Up):
                h = part(h, skips[-1].shape[-2:])
            else:
                h = self._run(part, h, context, skips[-1].shape[-2:])
        return h

    def _run(self, part: nn.Module, h: Tensor, *told: object) -> Tensor:
        """A part's answer; where it may forget, what it needs for the gradient is computed again."""
        if isinstance(part, Down):
            y: Tensor = part(h)
        elif self.checkpoint and self.training and torch.is_grad_enabled():
            y = checkpoint(part, h, *told, use_reentrant=False)
        else:
            y = part(h, *told)
        return y


def unet(
    shape: tuple[int, ...],
    *,
    classes: int = 0,
    attributes: int = 0,
    vocabulary: int = 0,
    features: int = 0,
    length: int = 0,
    image: int = 0,
    augmentation: int = 0,
    coordinates: int = 0,
    augment: bool = False,
    width: int = 64,
    multipliers: tuple[int, ...] = (1, 2, 2),
    blocks: int = 2,
    attention: tuple[int, ...] = (),
    cross: tuple[int, ...] = (),
    only_cross: tuple[int, ...] = (),
    depth: tuple[int, ...] = (1,),
    middle_attention: bool = True,
    middle_groups: int | None = None,
    head_width: int | None = None,
    heads: tuple[int, ...] | None = None,
    dropout: float = 0.0,
    scale_shift: bool = True,
    resample: Literal["conv", "residual"] = "conv",
    symmetric: bool = False,
    norm_groups: int | None = None,
    norm_eps: float = EPS,
    learned_variance: bool = False,
    patch: int = 1,
    embedding: Wave = "sinusoidal",
    fourier_scale: float | None = None,
    shift: float = 1.0,
    cos_first: bool = False,
    text_width: int | None = None,
    text_depth: int | None = None,
    text_heads: int | None = None,
    null_length: int = 1,
    pooled: bool = True,
    checkpoint: bool = False,
) -> UNet:
    """A U-Net for images of any size and number of channels.

    Level i has width·multipliers[i] channels at 1/2^i of the size (rounded up): `blocks` residual blocks on the way
    down and blocks + 1 on the way up. The last layer of every residual branch and of the net starts at zero.

    Args:
        shape: (C, H, W) of one image.
        classes: how many classes; 0 for a net that takes none.
        attributes: how many continuous attributes; 0 for a net that takes none.
        vocabulary: how many tokens a text encoder of its own knows; 0 for none.
        features: numbers of a given text embedding, for a net that reads those instead; 0 for none.
        length: the most tokens or embeddings of a text, at least 1 where it reads.
        image: channels of an image condition, joined to x; 0 for none.
        augmentation: how many numbers say how a picture was augmented; 0 for a net that is not told.
        coordinates: 2 for channels that say where in the full picture each pixel lies; 0 for none.
        augment: it is told how noisy that image is (Ho et al. 2022, cascades).
        width: channels of level 0; even, at least 4. The context has 4·width numbers.
        multipliers: the channels of each level over width, each at least 1.
        blocks: residual blocks a level, at least 1.
        attention: the levels (0 is full size) whose blocks are followed by self-attention.
        cross: the levels whose blocks are followed by a spatial transformer, which reads the text.
        only_cross: those of them whose first attention looks at the text, too, instead of at the pixels.
        depth: transformer blocks of each spatial transformer, one number for all levels or one a level.
        middle_attention: attention between the two middle blocks; a spatial transformer if there are levels of `cross`.
        middle_groups: groups of the norm of self-attention there, 0 for no norm; None as elsewhere.
        head_width: channels a head of attention; None for a single head.
        heads: instead, how many heads: one number for all levels or one a level.
        dropout: the probability of dropping a value inside a residual block, in [0, 1).
        scale_shift: time and class scale and shift (ADM) rather than are added (DDPM).
        resample: sizes change by a convolution (DDPM) or by a residual block (ADM).
        symmetric: convolutions that halve pad both sides (Stable Diffusion) rather than the end of an even one (DDPM).
        norm_groups: groups of every norm; None for up to 32 of at least four channels.
        norm_eps: added to the variance in every norm but that of a spatial transformer, which has 1e-6.
        learned_variance: 2·C channels out, the second half for the variance (Improved DDPM).
        patch: the side in pixels of the squares that the net sees as one pixel of C·patch² channels; 1 for pixels.
        embedding: of the time, "sinusoidal" for any clock or "fourier" for a clock of order 1.
        fourier_scale: the standard deviation of the Fourier frequencies, in cycles a unit of clock; 16 if None.
        shift: of the sinusoid's frequencies, 1 for DDPM, 0 for ADM and Stable Diffusion.
        cos_first: the sinusoid's cosines before its sines (ADM, Stable Diffusion).
        text_width: numbers of a word inside; None for `features`, or 4·width for tokens.
        text_depth: transformer blocks of the text encoder; 2 if None.
        text_heads: heads of its attention; 4 if None.
        null_length: words of the learned null, at most `length`.
        pooled: the mean of the words is added to the context.
        checkpoint: in training, compute stages again for the gradient instead of keeping what is inside them.

    Raises:
        BadShape: shape is not (C, H, W).
        BadArgument: a knob is out of its range, or has no effect beside the others.

    Reference: Ho et al. 2020, appendix B; Nichol & Dhariwal 2021, §3; Dhariwal & Nichol 2021, §3; Rombach et al. 2022.
    """
    _check(width, multipliers, blocks, dropout, patch, image, augment)
    text = _text(4 * width, vocabulary, features, length, text_width, text_depth, text_heads, null_length)
    also = tuple(name for name, part in (("text", text), ("image", image), ("window", coordinates)) if part)
    told: dict[str, Any] = {"classes": classes, "attributes": attributes, "augmentation": augmentation}
    wave: dict[str, Any] = {"embedding": embedding, "fourier_scale": fourier_scale, "shift": shift}
    context = Context(width, 4 * width, augment=augment, also=also, cos_first=cos_first, **told, **wave)
    style = Style(dropout, scale_shift, resample, symmetric, norm_groups, norm_eps)
    looks = (attention, cross, only_cross, depth, middle_attention, middle_groups, head_width, heads)
    attending = Attending(*looks, text.width if text else 0)
    layout = Layout(tuple(width * m for m in multipliers), blocks, 4 * width, style, attending)
    return UNet(_image(shape), layout, context, text, pooled, image, coordinates, learned_variance, patch, checkpoint)


def _image(shape: tuple[int, ...]) -> tuple[int, int, int]:
    if len(shape) != 3 or min(shape) < 1:
        raise BadShape(f"unet shape: got {tuple(shape)}, need (C, H, W) of at least 1 each; try mlp for points")
    channels, high, wide = shape
    return channels, high, wide


def _text(
    width: int,
    vocabulary: int,
    features: int,
    length: int,
    text_width: int | None,
    text_depth: int | None,
    text_heads: int | None,
    null_length: int,
) -> Text | None:
    """What reads the text; None where nothing is to be read."""
    own = {"text_width": text_width, "text_depth": text_depth, "text_heads": text_heads}
    if not vocabulary and not features:
        idle = {"length": length or None, "null_length": None if null_length == 1 else null_length, **own}
        _refuse(idle, "no text to read; try vocabulary=n or features=n")
        return None
    if not vocabulary:
        _refuse({"text_depth": text_depth, "text_heads": text_heads}, "no tokens to read; try vocabulary=n")
    depth, heads = 2 if text_depth is None else text_depth, 4 if text_heads is None else text_heads
    return Text(
        text_width or features or width,
        vocabulary=vocabulary,
        features=features,
        length=length,
        depth=depth if vocabulary else 0,
        heads=heads if vocabulary else 1,
        null_length=null_length,
    )


def _refuse(idle: dict[str, int | None], reason: str) -> None:
    """Refuse the first knob that was set, for it would have no effect."""
    for name, number in idle.items():
        if number is not None:
            raise BadArgument(f"unet {name}: got {number}, but {reason}")


def _check(
    width: int,
    multipliers: tuple[int, ...],
    blocks: int,
    dropout: float,
    patch: int,
    image: int,
    augment: bool,
) -> None:
    if width < 4 or width % 2:
        raise BadArgument(f"unet width: got {width}, need an even number of at least 4")
    if not multipliers or min(multipliers) < 1:
        raise BadArgument(f"unet multipliers: got {multipliers}, need at least one, each at least 1; try (1, 2, 2)")
    if blocks < 1:
        raise BadArgument(f"unet blocks: got {blocks}, need at least 1")
    if not 0 <= dropout < 1:
        raise BadArgument(f"unet dropout: got {dropout}, need at least 0 and below 1")
    if patch < 1:
        raise BadArgument(f"unet patch: got {patch}, need at least 1 pixel")
    if image < 0:
        raise BadArgument(f"unet image: got {image}, need 0 (none) or more channels")
    if augment and not image:
        raise BadArgument("unet augment: got true, but no image to be told about; try image=n")
