"""Interpolation between states of noise, along the sphere on which they lie."""

from __future__ import annotations

import torch
from torch import Tensor

from inkdrop.errors import BadArgument, BadShape

__all__ = ["slerp"]

STRAIGHT = 1e-4  # radians between two rows below which the arc is a line, to float32


def slerp(a: Tensor, b: Tensor, part: Tensor | float) -> Tensor:
    """Spherical interpolation of each row: sin((1 − p)·θ)/sin θ·a + sin(p·θ)/sin θ·b, θ the angle between the rows.

    Noise of many dimensions lies near a sphere; a straight line between two of its points passes inside, where no
    sampler was trained to start. Rows of one length keep it. part 0 gives a and 1 gives b, exactly. (Shoemake 1985;
    for DDIM: Song et al. 2021, appendix D.5.)

    Args:
        a: (B, ...).
        b: (B, ...), none of its rows opposite to a's.
        part: how far from a to b, in [0, 1]; a number, or (B,).

    Raises:
        BadShape: a and b differ in shape.
        BadArgument: a part outside [0, 1], a row of zeros, or rows that are opposite, between which no arc is shortest.
    """
    if a.shape != b.shape:
        raise BadShape(f"slerp: got {tuple(a.shape)} and {tuple(b.shape)}, need one shape")
    p = torch.as_tensor(part, dtype=torch.float64).expand(len(a))
    if not bool(((p >= 0) & (p <= 1)).all()):
        raise BadArgument(f"slerp part: got {p.tolist()}, need numbers in [0, 1]")
    one, two = (x.double().flatten(1) for x in (a, b))
    sizes = one.norm(dim=1) * two.norm(dim=1)
    if bool((sizes == 0).any()):
        raise BadArgument("slerp: got a row of zeros, which has no direction")
    unit_a, unit_b = (x / x.norm(dim=1, keepdim=True) for x in (one, two))
    angle = 2 * torch.atan2((unit_a - unit_b).norm(dim=1), (unit_a + unit_b).norm(dim=1))  # accurate at both ends
    if bool((angle > torch.pi - STRAIGHT).any()):
        raise BadArgument("slerp: got two opposite rows, between which no arc is the shortest")
    p = p.to(a.device)
    line = angle < STRAIGHT
    sine = torch.where(line, 1, angle.sin())
    first = torch.where(line, 1 - p, ((1 - p) * angle).sin() / sine)
    second = torch.where(line, p, (p * angle).sin() / sine)
    shape = (-1, *(1,) * (a.ndim - 1))
    return first.to(a.dtype).reshape(shape) * a + second.to(a.dtype).reshape(shape) * b
