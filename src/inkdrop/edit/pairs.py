"""Pairs: what is made of a picture as the image condition of a model: a small copy, a hole, its greys.

Public functions here that take the shape of the data are found by name:
`find("pairs", "lowres")((3, 64, 64), factor=4)`.
While training, `make` turns clean pictures into conditions; to sample, `given` turns a user's picture into one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from inkdrop.core.noise import Draw
from inkdrop.edit.operators import LUMA
from inkdrop.errors import BadArgument, BadShape

__all__ = ["Pair", "gray", "hole", "lowres", "middle_hole"]


class Pair(NamedTuple):
    """How an image condition is made.

    Attributes:
        channels: C' of the condition.
        size: (C, h, w) of the picture that a user gives; a picture of the data's own size is brought to it.
        make: (x0 (B, C, H, W), draw) -> (B, C', H, W): the conditions of clean pictures, for training.
        given: (pictures (B, C, h, w) or (B, C, H, W), masks (B, 1, H, W) bool or None) -> (B, C', H, W): of a user's.
        masked: whether it takes a mask: True where a pixel is kept.
        paste: (conditions (B, C', H, W), samples (B, C, H, W)) -> the samples with the pixels that are kept; None where
            none are.
    """

    channels: int
    size: tuple[int, int, int]
    make: Callable[[Tensor, Draw], Tensor]
    given: Callable[[Tensor, Tensor | None], Tensor]
    masked: bool = False
    paste: Callable[[Tensor, Tensor], Tensor] | None = None


def lowres(shape: tuple[int, ...], *, factor: int = 4) -> Pair:
    """Super-resolution: the picture at 1/factor of its size, each pixel the mean of a square, scaled up bilinearly.

    Args:
        shape: (C, H, W) of the data.
        factor: the side of the squares in pixels, ≥ 2, a divisor of H and W.

    Raises:
        BadShape: the data are no pictures.
        BadArgument: a factor that does not divide them.

    Reference: Saharia et al. 2021 (SR3), section 2; Ho et al. 2022 (cascades), section 3.
    """
    channels, height, width = _picture(shape, "lowres")
    if factor < 2 or height % factor or width % factor:
        raise BadArgument(f"lowres factor: got {factor}, need at least 2, and a divisor of {height} and {width}")

    def up(small: Tensor) -> Tensor:
        return functional.interpolate(small, size=(height, width), mode="bilinear", align_corners=False)

    def given(pictures: Tensor, masks: Tensor | None) -> Tensor:
        small = pictures.shape[-2:] == (height // factor, width // factor)
        return up(pictures if small else functional.avg_pool2d(pictures, factor))

    return Pair(
        channels,
        (channels, height // factor, width // factor),
        lambda x0, draw: up(functional.avg_pool2d(x0, factor)),
        given,
    )


def gray(shape: tuple[int, ...]) -> Pair:
    """Colourisation: the picture's greys, 0.299·R + 0.587·G + 0.114·B, as one channel.

    Args:
        shape: (3, H, W) of the data.

    Raises:
        BadShape: the data are no colour pictures.

    Reference: Saharia et al. 2022 (Palette), section 4.1; the weights of ITU-R BT.601.
    """
    if len(shape) != 3 or shape[0] != 3:
        raise BadShape(f"gray: got data of shape {tuple(shape)}, need colour pictures (3, H, W)")
    luma = torch.tensor(LUMA)[None, :, None, None]

    def grey(x: Tensor) -> Tensor:
        return (x * luma.to(x)).sum(1, keepdim=True)

    size = (shape[0], shape[1], shape[2])
    return Pair(1, size, lambda x0, draw: grey(x0), lambda pictures, masks: grey(pictures))


def hole(shape: tuple[int, ...], *, least: float = 0.25, most: float = 0.75) -> Pair:
    """Inpainting: the picture with a rectangle cut out of it, and the mask of what is kept.

    The condition's C channels are x0 where it is kept and 0 in the hole; one more is 1 where it is kept, else −1.
    While training the rectangle's sides are uniform on [least, most] of the picture's, and its place on what fits.

    Args:
        shape: (C, H, W) of the data.
        least: the shortest side of the hole as a share of the picture's, in (0, most].
        most: the longest, in [least, 1].

    Raises:
        BadShape: the data are no pictures.
        BadArgument: shares out of their range.

    Reference: Saharia et al. 2022 (Palette), section 4.2; Rombach et al. 2022, section 4.5.
    """
    channels, height, width = _picture(shape, "hole")
    if not 0 < least <= most <= 1:
        raise BadArgument(f"hole: got least {least:g} and most {most:g}, need 0 < least ≤ most ≤ 1")

    def cut(x: Tensor, keep: Tensor) -> Tensor:
        known = torch.where(keep, x, torch.zeros_like(x))
        mask = (2.0 * keep - 1).to(x)
        return torch.cat([known, mask.expand(len(known), *mask.shape[1:])], dim=1)

    def make(x0: Tensor, draw: Draw) -> Tensor:
        u = draw.uniform("augment", 4).to(x0.device)
        keep = torch.ones(len(x0), 1, height, width, dtype=torch.bool, device=x0.device)
        for row, (a, b, c, d) in enumerate(u.tolist()):
            high, wide = (max(1, round((least + (most - least) * v) * n)) for v, n in ((a, height), (b, width)))
            top, left = int(c * (height - high + 1)), int(d * (width - wide + 1))
            keep[row, :, top : top + high, left : left + wide] = False
        return cut(x0, keep)

    def given(pictures: Tensor, masks: Tensor | None) -> Tensor:
        if masks is None:
            raise BadArgument("image: this model fills holes; give a mask too (--mask, white where pixels are kept)")
        return cut(pictures, masks.to(pictures.device))

    def paste(condition: Tensor, x: Tensor) -> Tensor:
        return torch.where(condition[:, channels:] > 0, condition[:, :channels].to(x), x)

    return Pair(channels + 1, (channels, height, width), make, given, masked=True, paste=paste)


def middle_hole(count: int, shape: tuple[int, ...]) -> Tensor:
    """Masks (count, 1, H, W) bool that keep all but the middle half of each side, for previews and scores."""
    high, wide = shape[1:]
    mask = torch.ones(count, 1, high, wide, dtype=torch.bool)
    mask[..., high // 4 : high - high // 4, wide // 4 : wide - wide // 4] = False
    return mask


def _picture(shape: tuple[int, ...], what: str) -> tuple[int, int, int]:
    if len(shape) != 3 or min(shape) < 1:
        raise BadShape(f"{what}: got data of shape {tuple(shape)}, need pictures (C, H, W)")
    channels, height, width = shape
    return channels, height, width
