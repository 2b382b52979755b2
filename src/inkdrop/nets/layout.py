"""Layout: the stages of a U-Net, where they stand and what they are made of."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn

from inkdrop.errors import BadArgument
from inkdrop.nets.blocks import EPS, Down, ResBlock, SelfAttention, Up
from inkdrop.nets.spatial import SpatialTransformer
from inkdrop.nets.text import Words

__all__ = ["Attending", "Layout", "Stage", "Style"]


class Stage(nn.Module):
    """One residual block, and attention after it where the level has it."""

    def __init__(self, block: ResBlock, attention: SelfAttention | SpatialTransformer | None) -> None:
        super().__init__()
        self.block = block
        self.attention = attention

    def forward(self, x: Tensor, context: Tensor, words: Words | None = None) -> Tensor:
        """x (B, C, H, W), context (B, D), words where it reads -> (B, C', H, W)."""
        h: Tensor = self.block(x, context)
        if self.attention is None:
            return h
        y: Tensor = self.attention(h, words) if isinstance(self.attention, SpatialTransformer) else self.attention(h)
        return y


@dataclass(frozen=True)
class Style:
    """What blocks are made of.

    Attributes:
        dropout: in residual blocks, in [0, 1).
        scale_shift: they scale and shift (ADM) rather than add (DDPM).
        resample: sizes change by a convolution or by a residual block.
        symmetric: the padding of `Down`.
        norm_groups: of every norm; None for `blocks.groups`.
        norm_eps: of every norm but those of spatial transformers.
    """

    dropout: float = 0.0
    scale_shift: bool = True
    resample: Literal["conv", "residual"] = "conv"
    symmetric: bool = False
    norm_groups: int | None = None
    norm_eps: float = EPS


@dataclass(frozen=True)
class Attending:
    """Which levels attend, and how.

    Attributes:
        own: the levels with self-attention.
        cross: the levels with spatial transformers.
        only_cross: those of them whose first attention looks at the text, too.
        depth: transformer blocks of each, one number for all levels or one a level.
        middle: whether there is attention between the two middle blocks.
        middle_groups: groups of its norm; 0 for no norm, None as elsewhere.
        head_width: channels a head; None for a single head.
        heads: or how many heads, one number for all levels or one a level.
        text: numbers of a word; 0 without text.
    """

    own: tuple[int, ...] = ()
    cross: tuple[int, ...] = ()
    only_cross: tuple[int, ...] = ()
    depth: tuple[int, ...] = (1,)
    middle: bool = True
    middle_groups: int | None = None
    head_width: int | None = None
    heads: tuple[int, ...] | None = None
    text: int = 0


@dataclass(frozen=True)
class Layout:
    """The stages of a U-Net.

    Attributes:
        widths: channels of each level, the full size first.
        blocks: residual blocks a level on the way down; one more on the way up.
        context: numbers of the context vector.
        style: what blocks are made of.
        attending: which levels attend, and how.

    Raises:
        BadArgument: a level that is not there, or a setting that has no effect beside the others.
    """

    widths: tuple[int, ...]
    blocks: int
    context: int
    style: Style
    attending: Attending

    def __post_init__(self) -> None:
        at, levels = self.attending, len(self.widths)
        for name, chosen in (("attention", at.own), ("cross", at.cross)):
            for level in chosen:
                if not 0 <= level < levels:
                    raise BadArgument(f"unet {name}: got level {level}, need 0 to {levels - 1}; try {name}=[]")
        if both := set(at.own) & set(at.cross):
            raise BadArgument(f"unet attention: got level {min(both)}, which is in cross; a transformer does both")
        if alone := set(at.only_cross) - set(at.cross):
            raise BadArgument(f"unet only_cross: got level {min(alone)}, need levels of cross, {at.cross}")
        if at.cross and not at.text:
            raise BadArgument(f"unet cross: got levels {at.cross}, but no text; try vocabulary=n or features=n")
        for name, numbers in (("depth", at.depth), ("heads", at.heads or (1,))):
            if len(numbers) not in (1, levels) or min(numbers) < 1:
                raise BadArgument(f"unet {name}: got {numbers}, need one number, or one for each of {levels} levels")
        self._check_effects()

    def _check_effects(self) -> None:
        at, style = self.attending, self.style
        if at.depth != (1,) and not at.cross:
            raise BadArgument(f"unet depth: got {at.depth}, but no level has a spatial transformer; try cross=1")
        if at.heads is not None and at.head_width is not None:
            raise BadArgument(f"unet heads: got {at.heads} and head_width {at.head_width}, need one of them")
        if at.middle_groups is not None and (at.cross or not at.middle):
            raise BadArgument(
                f"unet middle_groups: got {at.middle_groups}, but there is no self-attention in the middle"
            )
        if style.resample not in ("conv", "residual"):
            raise BadArgument(f"unet resample: got {style.resample!r}, need 'conv' or 'residual'")
        if len(self.widths) == 1 and (style.symmetric or style.resample != "conv"):
            raise BadArgument(
                "unet symmetric, resample: set for one level, which is never halved; try more multipliers"
            )
        if style.symmetric and style.resample != "conv":
            raise BadArgument("unet symmetric: got true, but no convolution halves the size; try resample='conv'")
        if not style.norm_eps > 0:
            raise BadArgument(f"unet norm_eps: got {style.norm_eps}, need more than 0; try 1e-5")

    def down(self) -> tuple[list[nn.Module], list[int]]:
        """The way down, and the channels of every skip, the stem's first."""
        parts: list[nn.Module] = []
        skips = [self.widths[0]]
        for level, out in enumerate(self.widths):
            for _ in range(self.blocks):
                parts.append(self._stage(skips[-1], level))
                skips.append(out)
            if level < len(self.widths) - 1:
                conv = self.style.resample == "conv"
                parts.append(Down(out, symmetric=self.style.symmetric) if conv else self._block(out, out, "down"))
                skips.append(out)
        return parts, skips

    def middle(self) -> list[Stage]:
        """The stages at the smallest size; the first attends, by a spatial transformer if there are others."""
        at, last = self.attending, len(self.widths) - 1
        wide = self.widths[last]
        first = Stage(self._block(wide, wide), None)
        if at.middle and at.cross:
            first.attention = self._transformer(last, only_cross=False)
        elif at.middle:
            groups = self.style.norm_groups if at.middle_groups is None else at.middle_groups
            first.attention = self._self_attention(last, groups)
        return [first, Stage(self._block(wide, wide), None)]

    def up(self, skips: list[int]) -> list[nn.Module]:
        """The way up; each stage takes one skip, the last first."""
        parts: list[nn.Module] = []
        inp, left = self.widths[-1], list(skips)
        for level in reversed(range(len(self.widths))):
            for _ in range(self.blocks + 1):
                parts.append(self._stage(inp + left.pop(), level))
                inp = self.widths[level]
            if level:
                parts.append(Up(inp) if self.style.resample == "conv" else self._block(inp, inp, "up"))
        return parts

    def _stage(self, inp: int, level: int) -> Stage:
        stage = Stage(self._block(inp, self.widths[level]), None)
        if level in self.attending.cross:
            stage.attention = self._transformer(level, only_cross=level in self.attending.only_cross)
        elif level in self.attending.own:
            stage.attention = self._self_attention(level, self.style.norm_groups)
        return stage

    def _block(self, inp: int, out: int, resample: Literal["down", "up"] | None = None) -> ResBlock:
        return ResBlock(
            inp,
            out,
            self.context,
            dropout=self.style.dropout,
            scale_shift=self.style.scale_shift,
            resample=resample,
            norm_groups=self.style.norm_groups,
            norm_eps=self.style.norm_eps,
        )

    def _self_attention(self, level: int, norm_groups: int | None) -> SelfAttention:
        head, eps = self._head_width(level), self.style.norm_eps
        return SelfAttention(self.widths[level], head_width=head, norm_groups=norm_groups, norm_eps=eps)

    def _transformer(self, level: int, *, only_cross: bool) -> SpatialTransformer:
        at = self.attending
        return SpatialTransformer(
            self.widths[level],
            at.text,
            head_width=self._head_width(level),
            depth=_of_level(at.depth, level),
            only_cross=only_cross,
            norm_groups=self.style.norm_groups,
        )

    def _head_width(self, level: int) -> int | None:
        if self.attending.heads is None:
            return self.attending.head_width
        channels, heads = self.widths[level], _of_level(self.attending.heads, level)
        if channels % heads:
            raise BadArgument(f"unet heads: got {heads}, need a divisor of the {channels} channels of level {level}")
        return channels // heads


def _of_level(numbers: tuple[int, ...], level: int) -> int:
    """One number for all levels, or that of the level."""
    return numbers[level if len(numbers) > 1 else 0]
