"""Measurement operators: the linear maps y = A·x0 of inverse problems.

Public functions here that take the shape of the data are found by name:
`find("operators", "superresolve")((3, 32, 32), factor=4)`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from inkdrop.errors import BadArgument, BadShape

__all__ = ["Operator", "blur", "gray", "mask", "masked", "superresolve"]

LUMA = (0.299, 0.587, 0.114)  # ITU-R 601, by which colour files are read as grey


class Operator(NamedTuple):
    """A linear map A from clean data (B, C, *S) to measurements (B, *shape), with what solving it takes.

    Attributes:
        shape: of one measurement.
        apply: x -> A·x.
        transpose: y -> Aᵀ·y.
        solve: (y, a, b) -> (a·A·Aᵀ + b·I)⁻¹·y for a > 0 and b ≥ 0, floats or tensors that multiply y; where A·Aᵀ is
            singular, on the range of A only.
    """

    shape: tuple[int, ...]
    apply: Callable[[Tensor], Tensor]
    transpose: Callable[[Tensor], Tensor]
    solve: Callable[[Tensor, Tensor | float, Tensor | float], Tensor]

    def inverse(self, y: Tensor) -> Tensor:
        """The pseudo-inverse A⁺·y = Aᵀ·(A·Aᵀ)⁻¹·y: the least x that measures y."""
        return self.transpose(self.solve(y, 1.0, 0.0))


def _picture(shape: tuple[int, ...], what: str) -> tuple[int, int, int]:
    if len(shape) != 3 or min(shape) < 1:
        raise BadShape(f"{what}: got data of shape {tuple(shape)}, need images (C, H, W)")
    channels, height, width = shape
    return channels, height, width


def superresolve(shape: tuple[int, ...], *, factor: int = 2) -> Operator:
    """A small picture, each of its pixels the mean of a square of the large one: what super-resolution undoes.

    A·Aᵀ = I/factor², so A⁺ repeats each pixel factor × factor times.

    Args:
        shape: (C, H, W) of the large picture.
        factor: the side of the squares in pixels, ≥ 2; it must divide H and W.
    """
    channels, height, width = _picture(shape, "superresolve")
    if factor < 2 or height % factor or width % factor:
        raise BadArgument(
            f"superresolve factor: got {factor}, need at least 2, and a divisor of the {height} × {width} pixels"
        )

    def spread(y: Tensor) -> Tensor:
        return y.repeat_interleave(factor, -2).repeat_interleave(factor, -1) / factor**2

    return Operator(
        (channels, height // factor, width // factor),
        lambda x: functional.avg_pool2d(x, factor),
        spread,
        lambda y, a, b: y / (a / factor**2 + b),
    )


def blur(shape: tuple[int, ...], *, std: float = 1.0, floor: float = 0.05) -> Operator:
    """A picture blurred by a Gaussian, around its edges: what deblurring undoes.

    In Fourier space it multiplies by h(ω) = exp(−std²·|ω|²/2), and by 0 where h would be below `floor`: what is so
    faint is lost in the rounding of any file, and its inverse would be that rounding, enlarged. Aᵀ = A.

    Args:
        shape: (C, H, W).
        std: the Gaussian's standard deviation in pixels, > 0.
        floor: the least factor that counts, in (0, 1); A⁺ multiplies by 1/floor at most.
    """
    _, height, width = _picture(shape, "blur")
    if not 0 < std < math.inf:
        raise BadArgument(f"blur std: got {std:g}, need a positive number of pixels; try 1")
    if not 0 < floor < 1:
        raise BadArgument(f"blur floor: got {floor:g}, need a number in (0, 1); try 0.05")
    rows, columns = (2 * math.pi * f.double() for f in (torch.fft.fftfreq(height), torch.fft.rfftfreq(width)))
    gain = (-0.5 * std**2 * (rows[:, None] ** 2 + columns**2)).exp()
    gain = torch.where(gain < floor, 0, gain)

    def filtered(x: Tensor, factor: Tensor) -> Tensor:
        out: Tensor = torch.fft.irfft2(torch.fft.rfft2(x) * factor.to(x.device, x.dtype), s=(height, width))
        return out

    def solve(y: Tensor, a: Tensor | float, b: Tensor | float) -> Tensor:
        own = gain.to(y.device)
        return filtered(y, torch.where(own == 0, 0, 1 / torch.where(own == 0, 1, a * own**2 + b)))

    return Operator(tuple(shape), lambda x: filtered(x, gain), lambda y: filtered(y, gain), solve)


def gray(shape: tuple[int, ...]) -> Operator:
    """The luma 0.299·R + 0.587·G + 0.114·B of a picture in colour: what colourising undoes.

    Args:
        shape: (3, H, W).
    """
    channels, height, width = _picture(shape, "gray")
    if channels != 3:
        raise BadShape(f"gray: got data of {channels} channels, need 3, red, green and blue")
    weights = torch.tensor(LUMA, dtype=torch.float64).reshape(3, 1, 1)
    square = float((weights**2).sum())
    return Operator(
        (1, height, width),
        lambda x: (weights.to(x.device, x.dtype) * x).sum(1, keepdim=True),
        lambda y: weights.to(y.device, y.dtype) * y,
        lambda y, a, b: y / (a * square + b),
    )


def mask(shape: tuple[int, ...], *, box: tuple[int, int, int, int]) -> Operator:
    """A picture without what is in a box: what filling in undoes; measurements are 0 in the box.

    Args:
        shape: (C, H, W).
        box: (top, left, height, width) in pixels, within the picture.
    """
    _, height, width = _picture(shape, "mask")
    top, left, tall, wide = box
    if not (0 <= top < top + tall <= height and 0 <= left < left + wide <= width):
        raise BadArgument(f"mask box: got {box}, need (top, left, height, width) within the {height} × {width} pixels")
    keep = torch.ones(1, height, width, dtype=torch.bool)
    keep[:, top : top + tall, left : left + wide] = False
    return masked(keep.expand(shape))


def masked(keep: Tensor) -> Operator:
    """Data without some entries; measurements are 0 there.

    Args:
        keep: bool, of the shape of one sample, True where it is measured.
    """
    if keep.dtype != torch.bool:
        raise BadShape(f"masked: got {keep.dtype}, need bool, True where the data are measured")

    def held(x: Tensor) -> Tensor:
        return torch.where(keep.to(x.device), x, 0)

    return Operator(tuple(keep.shape), held, held, lambda y, a, b: y / (a + b))
