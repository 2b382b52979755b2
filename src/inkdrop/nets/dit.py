"""DiT: a transformer on the patches of an image, told time and class by adaLN-Zero; S, B, L and XL."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint as recompute

from inkdrop.core.cond import Cond
from inkdrop.errors import BadArgument, BadShape
from inkdrop.nets.embed import Context, Coordinates, ImageCondition, Wave, check_input
from inkdrop.nets.text import Text
from inkdrop.nets.transformer import NORM_EPS, DiTBlock, DiTHead, positions, unpatchify, xavier

__all__ = ["DiT", "dit", "dit_b", "dit_l", "dit_mnist", "dit_s", "dit_xl"]

Patch: TypeAlias = Literal[2, 4, 8]
"""The sides of a patch in the paper's table 1."""

Reading: TypeAlias = Literal["cross", "joint"]
"""How a text is read: by cross-attention in every block, or as tokens beside those of the image."""

_WAVE = 256
"""Numbers of the wave that tells the time, at any width, as in the paper's code."""

_STD = 0.02
"""The standard deviation of the first weights of time and class, as in the paper's code."""


class DiT(nn.Module):
    """The module that `dit` makes.

    Args:
        shape: (C, H, W) that it was made for; other sizes run too if the patch divides them, other C do not.
        patch: the side of a patch in pixels.
        contexts: clock, class and attributes -> (B, D): one for all blocks and the head, or one for each block.
        text: what reads; without cross-attention in the blocks its words are tokens beside those of the image.
        image: channels of an image condition; 0 for none.
        coordinates: channels that say where each pixel lies; 0 for none.
        blocks: in the order in which they run.
        learned_variance: whether the output has 2·C channels.
        checkpoint: whether blocks are computed again in the backward pass; may be set later, too.
    """

    def __init__(
        self,
        shape: tuple[int, int, int],
        patch: int,
        contexts: Sequence[Context],
        text: Text | None,
        image: int,
        coordinates: int,
        blocks: Sequence[DiTBlock],
        learned_variance: bool,
        checkpoint: bool,
    ) -> None:
        super().__init__()
        width = blocks[0].width
        self.shape, self.patch, self.width = shape, patch, width
        self.learned_variance, self.checkpoint = learned_variance, checkpoint
        self.context, self.contexts = contexts[0], nn.ModuleList(contexts[1:])
        self.text = text
        self.joint = nn.LayerNorm(width) if text is not None and blocks[0].cross is None else None
        self.image = ImageCondition(image) if image else None
        self.coordinates = Coordinates(coordinates) if coordinates else None
        self.stem = nn.Conv2d(shape[0] + image + coordinates, width, patch, stride=patch)
        self.blocks = nn.ModuleList(blocks)
        self.head = DiTHead(width, patch**2 * shape[0] * (2 if learned_variance else 1))
        xavier(self.stem)

    @property
    def classes(self) -> int:
        """How many classes the net takes; 0 if it takes none."""
        return self.context.classes

    def forward(self, x: Tensor, clock: Tensor, cond: Cond | None = None) -> Tensor:
        """The net's answer.

        Args:
            x: (B, C, H, W), H and W multiples of the patch.
            clock: (B,) float32 or float64, the time in the unit that the net was trained with.
            cond: what each row is told; None for null in every row.

        Returns:
            (B, C, H, W); with learned variance (B, 2·C, H, W), whose second half is 2·v − 1, v the fraction in
            [0, 1] between log beta-tilde and log beta, not clamped (Improved DDPM, eq. 15).

        Raises:
            BadShape: x has other than C channels or a side that the patch does not divide, or x, clock and cond differ
                in rows.
            BadArgument: cond has a field that this net does not take, or a label or token out of range.
        """
        check_input(x, clock, self.shape, any_size=True)
        rows, columns = _grid(x.shape[2], x.shape[3], self.patch)
        told = [functional.silu(part(clock, cond)) for part in (self.context, *self.contexts)]
        h, mask, words = self._read(self._tokens(x, cond), cond)
        for i, block in enumerate(self.blocks):
            asked = (h, told[i % len(told)], mask, words)
            if self.checkpoint and torch.is_grad_enabled():
                h = recompute(block, *asked, use_reentrant=False)
            else:
                h = block(*asked)
        return unpatchify(self.head(h[:, -rows * columns :], told[0]), rows, columns, self.patch)

    def _tokens(self, x: Tensor, cond: Cond | None) -> Tensor:
        """The patches of x, and of an image beside it, as tokens (B, N, D) that know their places."""
        if self.image is not None:
            x = torch.cat([x, self.image(cond, x)], dim=1)
        if self.coordinates is not None:
            x = torch.cat([x, self.coordinates(cond, x)], dim=1)
        h = self.stem(x)
        made = (self.shape[1] // self.patch, self.shape[2] // self.patch)
        place = positions(h.shape[2], h.shape[3], self.width, made, h.device)
        tokens: Tensor = h.flatten(2).transpose(1, 2) + place.to(h.dtype)
        return tokens

    def _read(self, h: Tensor, cond: Cond | None) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """The tokens, those that they look at, and the words beside them if they are not among them."""
        if self.text is None:
            return h, None, None
        words, mask, _ = self.text(cond, h.shape[0])
        if self.joint is None:
            return h, mask, words
        return torch.cat([self.joint(words), h], dim=1), torch.cat([mask, mask.new_ones(h.shape[:2])], dim=1), None


def dit(
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
    patch: int = 2,
    width: int = 256,
    depth: int = 8,
    heads: int = 4,
    mlp_ratio: float = 4.0,
    text: Reading | None = None,
    dropout: float = 0.0,
    learned_variance: bool = False,
    checkpoint: bool = False,
    embedding: Wave = "sinusoidal",
    fourier_scale: float | None = None,
    eps: float = NORM_EPS,
    shared: bool = True,
) -> DiT:
    """A diffusion transformer (adaLN-Zero) for images and latents of any size that the patch divides.

    Args:
        shape: (C, H, W) of one sample.
        classes: how many classes; 0 for a net that takes none.
        attributes: how many continuous attributes.
        vocabulary: how many tokens there are, for texts read by an encoder trained with the net.
        features: numbers of a given text embedding.
        length: the most tokens or embeddings of a text.
        image: channels of an image condition, joined to x.
        augmentation: how many numbers say how a picture was augmented.
        coordinates: 2 for channels that say where in the full picture each pixel lies, or 0.
        augment: whether it is told how noisy that image is.
        patch: the side of a patch in pixels, at least 1.
        width: numbers a token, a multiple of 4, at least 8.
        depth: blocks, at least 1.
        heads: of attention, a divisor of width.
        mlp_ratio: the perceptron's middle over width, > 0.
        text: "cross" for cross-attention in every block, "joint" for tokens beside the image's; cross where None.
        dropout: the probability of dropping a number inside a block, in [0, 1).
        learned_variance: 2·C channels out, the second half for the variance (Improved DDPM).
        checkpoint: compute blocks again in the backward pass, to save memory.
        embedding: of the time, "sinusoidal" for any clock or "fourier" for a clock of order 1.
        fourier_scale: the standard deviation of the Fourier frequencies, in cycles a unit of clock; 16 if None.
        eps: added to the variance in each block's second norm, > 0; 1e-5 in the weights that diffusers publishes.
        shared: one embedding of time and class for all blocks; False for one a block, as diffusers stores them.

    Raises:
        BadShape: shape is not (C, H, W), or the patch does not divide it.
        BadArgument: a knob is out of its range, or has no effect.
    """
    size = _check(shape, patch, width, depth, heads, mlp_ratio, dropout, eps)
    reader = _reader(width, heads, vocabulary, features, length, text)
    terms = (classes, attributes, reader is not None, image, augment, augmentation, coordinates)
    contexts = [_context(width, *terms, embedding, fourier_scale) for _ in range(1 if shared else depth)]
    form = (width, heads, round(mlp_ratio * width), reader is not None and text != "joint", dropout, eps)
    blocks = [DiTBlock(*form) for _ in range(depth)]
    return DiT(size, patch, contexts, reader, image, coordinates, blocks, learned_variance, checkpoint)


def dit_s(
    shape: tuple[int, ...],
    *,
    classes: int = 0,
    features: int = 0,
    length: int = 0,
    patch: Patch = 2,
    text: Reading | None = None,
    learned_variance: bool = False,
    checkpoint: bool = False,
) -> DiT:
    """DiT-S: 33 M parameters, 12 blocks of 384 numbers a token (Peebles & Xie 2023, table 1)."""
    return dit(
        shape,
        classes=classes,
        features=features,
        length=length,
        patch=patch,
        width=384,
        depth=12,
        heads=6,
        text=text,
        learned_variance=learned_variance,
        checkpoint=checkpoint,
    )


def dit_b(
    shape: tuple[int, ...],
    *,
    classes: int = 0,
    features: int = 0,
    length: int = 0,
    patch: Patch = 2,
    text: Reading | None = None,
    learned_variance: bool = False,
    checkpoint: bool = False,
) -> DiT:
    """DiT-B: 130 M parameters, 12 blocks of 768 numbers a token (Peebles & Xie 2023, table 1)."""
    return dit(
        shape,
        classes=classes,
        features=features,
        length=length,
        patch=patch,
        width=768,
        depth=12,
        heads=12,
        text=text,
        learned_variance=learned_variance,
        checkpoint=checkpoint,
    )


def dit_l(
    shape: tuple[int, ...],
    *,
    classes: int = 0,
    features: int = 0,
    length: int = 0,
    patch: Patch = 2,
    text: Reading | None = None,
    learned_variance: bool = False,
    checkpoint: bool = False,
) -> DiT:
    """DiT-L: 458 M parameters, 24 blocks of 1,024 numbers a token (Peebles & Xie 2023, table 1)."""
    return dit(
        shape,
        classes=classes,
        features=features,
        length=length,
        patch=patch,
        width=1024,
        depth=24,
        heads=16,
        text=text,
        learned_variance=learned_variance,
        checkpoint=checkpoint,
    )


def dit_xl(
    shape: tuple[int, ...],
    *,
    classes: int = 0,
    features: int = 0,
    length: int = 0,
    patch: Patch = 2,
    text: Reading | None = None,
    learned_variance: bool = False,
    checkpoint: bool = False,
) -> DiT:
    """DiT-XL: 675 M parameters, 28 blocks of 1,152 numbers a token (Peebles & Xie 2023, table 1)."""
    return dit(
        shape,
        classes=classes,
        features=features,
        length=length,
        patch=patch,
        width=1152,
        depth=28,
        heads=16,
        text=text,
        learned_variance=learned_variance,
        checkpoint=checkpoint,
    )


def dit_mnist(
    shape: tuple[int, ...], *, classes: int = 0, width: int = 96, dropout: float = 0.0, learned_variance: bool = False
) -> DiT:
    """A DiT of 0.9 M parameters for 28×28 digits on a CPU, whose update costs the time of one of `unet_mnist`."""
    return dit(
        shape,
        classes=classes,
        patch=4,
        width=width,
        depth=5,
        heads=4,
        dropout=dropout,
        learned_variance=learned_variance,
    )


def _check(
    shape: tuple[int, ...], patch: int, width: int, depth: int, heads: int, mlp_ratio: float, dropout: float, eps: float
) -> tuple[int, int, int]:
    """The shape, if it and the knobs that need no other are in range."""
    if len(shape) != 3 or min(shape) < 1:
        raise BadShape(f"dit shape: got {tuple(shape)}, need (C, H, W) of at least 1 each; try mlp for points")
    if patch < 1:
        raise BadArgument(f"dit patch: got {patch}, need at least 1 pixel")
    if width < 8 or width % 4:
        raise BadArgument(f"dit width: got {width}, need a multiple of 4 of at least 8")
    if depth < 1:
        raise BadArgument(f"dit depth: got {depth}, need at least 1")
    if heads < 1 or width % heads:
        raise BadArgument(f"dit heads: got {heads}, need a divisor of {width}, the width")
    if not mlp_ratio * width >= 1:
        raise BadArgument(f"dit mlp_ratio: got {mlp_ratio}, need more than 0; try 4")
    if not 0 <= dropout < 1:
        raise BadArgument(f"dit dropout: got {dropout}, need at least 0 and below 1")
    if not eps > 0:
        raise BadArgument(f"dit eps: got {eps}, need more than 0; try 1e-6")
    channels, high, wide = shape
    _grid(high, wide, patch)
    return channels, high, wide


def _grid(high: int, wide: int, patch: int) -> tuple[int, int]:
    """How many patches (down, across) an image has.

    Raises:
        BadShape: the patch does not divide a side.
    """
    if high % patch or wide % patch:
        raise BadShape(
            f"dit: got images of {high}×{wide}, need multiples of {patch}, the patch; try another size or patch"
        )
    return high // patch, wide // patch


def _reader(width: int, heads: int, vocabulary: int, features: int, length: int, text: str | None) -> Text | None:
    """What reads a text; None for a net without one."""
    if text not in (None, "cross", "joint"):
        raise BadArgument(f"dit text: got {text!r}, need cross or joint")
    if vocabulary or features:
        if length < 1:
            raise BadArgument(f"dit length: got {length} with a text, need at least 1 place; try 32")
        return Text(width, vocabulary=vocabulary, features=features, length=length, heads=heads)
    for name, given in (("text", text), ("length", length)):
        if given:
            raise BadArgument(f"dit {name}: got {given!r}, but this net reads no text; try vocabulary=n or features=n")
    return None


def _context(
    width: int,
    classes: int,
    attributes: int,
    text: bool,
    image: int,
    augment: bool,
    augmentation: int,
    coordinates: int,
    embedding: Wave,
    fourier_scale: float | None,
) -> Context:
    """What the blocks are told, started as in the paper's code: small weights, no biases, class vectors near 0."""
    if augment and not image:
        raise BadArgument("dit augment: got true, but this net takes no image; try image=n, or leave it out")
    also = ("text",) * text + ("image",) * (image > 0) + ("window",) * (coordinates > 0)
    told: dict[str, Any] = {"classes": classes, "attributes": attributes, "augmentation": augmentation}
    wave: dict[str, Any] = {"embedding": embedding, "fourier_scale": fourier_scale}
    cos_first = embedding == "sinusoidal"
    context = Context(_WAVE, width, augment=augment, also=also, cos_first=cos_first, **told, **wave)
    for layer in (context.linear1, context.linear2):
        nn.init.normal_(layer.weight, std=_STD)
        nn.init.zeros_(layer.bias)
    if context.label is not None:
        nn.init.normal_(context.label.table.weight, std=_STD)
    return context
