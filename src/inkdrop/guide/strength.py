"""Strength: guidance as a function of time, within an interval of it."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from inkdrop.core.level import Level
from inkdrop.errors import BadArgument

__all__ = ["Shape", "Strength", "strength"]

Shape: TypeAlias = Literal["constant", "linear", "cosine"]
"""How the strength runs through the interval; the mean over it is the scale in all of them."""

Strength: TypeAlias = Callable[[Level], Tensor]
"""Level -> w, float64, of the shape of level.t."""

_SHAPES: dict[str, Callable[[Tensor], Tensor]] = {
    "constant": torch.ones_like,
    "linear": lambda u: 2 * (1 - u),
    "cosine": lambda u: 1 + torch.cos(math.pi * u),
}

_SLACK = 1e-9  # of the interval: a grid's time that was meant to be its end is its end


def strength(
    what: str, *, scale: float, rest: float = 1.0, start: float = 1.0, stop: float = 0.0, shape: Shape = "constant"
) -> Strength:
    """The strength w(t) = rest + (scale − rest)·f(u) in the interval stop < t ≤ start, and rest outside it.

    u = (t − stop)/(start − stop) runs from 1 at the noisy end to 0 at the clean one, and f is 1 (constant), 2·(1 − u)
    (linear) or 1 + cos(π·u) (cosine): more towards the clean end, with mean 1, so that the mean of w over the interval
    is `scale` (the interval: Kynkäänniemi et al. 2024, section 3; the shapes: Wang et al. 2024, their heuristics).

    Args:
        what: whose, for messages.
        scale: finite, ≥ 0.
        rest: the strength that is none: 1 where two nets are mixed, 0 where a score is added.
        start: the noisiest time, in (0, 1].
        stop: the time after which it ends, in [0, start).
        shape: of the strength over the interval.

    Raises:
        BadArgument: a number outside its range, a scale below `rest` that is not constant, or an interval or a shape of
            a strength that is none.
    """
    if not (math.isfinite(scale) and scale >= 0):
        raise BadArgument(f"{what} scale: got {scale:g}, need a finite number of at least 0; try 1 to 8")
    if not 0 <= stop < start <= 1:
        raise BadArgument(
            f"{what} start and stop: got {start:g} and {stop:g}, need 0 <= stop < start <= 1, as t runs from noise at 1"
        )
    if shape not in _SHAPES:
        raise BadArgument(f"{what} shape: got {shape!r}, need {', '.join(_SHAPES)}")
    if scale == rest and (start, stop, shape) != (1, 0, "constant"):
        raise BadArgument(f"{what}: start, stop and shape have no effect at scale {scale:g}, which guides nowhere")
    if scale < rest and shape != "constant":
        raise BadArgument(f"{what} shape: got {shape!r} at scale {scale:g}, need a scale of more than {rest:g} for it")

    def at(level: Level) -> Tensor:
        u = (level.t - stop) / (start - stop)
        part = _SHAPES[shape](u)
        inside = (u > _SLACK) & (u <= 1 + _SLACK)
        return torch.where(inside, part * scale + (1 - part) * rest, torch.full_like(u, rest))

    return at
