"""Clocks: what a net is told about time, as a function of the level. Found by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

from torch import Tensor

from inkdrop.core.level import Level

__all__ = ["Clock", "lam", "sigma", "table", "time"]

Clock: TypeAlias = Callable[[Level], Tensor]
"""Level -> a number for the net, float64, the shape of level.alpha."""


def table(level: Level, *, steps: int = 1000, rounded: bool = False) -> Tensor:
    """DDPM's timestep t·T − 1, in [0, T − 1]; T is the schedule's own by default.

    Args:
        level: of the question.
        steps: T.
        rounded: whether a timestep between two entries becomes the nearest (half to even), as some samplers of
            diffusers tell their nets, or stays a fraction.
    """
    clock = level.t * steps - 1
    return clock.round() if rounded else clock


def time(level: Level, *, scale: float = 1000.0) -> Tensor:
    """Time itself, times `scale`, as flow-matching nets are told."""
    return level.t * scale


def sigma(level: Level, *, scale: float = 1000.0) -> Tensor:
    """The standard deviation of the noise, times `scale`: what nets of flow matching are told, whatever the shift."""
    return level.sigma * scale


def lam(level: Level, *, scale: float = 0.25) -> Tensor:
    """log(sigma/alpha)·scale: EDM's c_noise at 1/4 (Karras et al. 2022, table 1). Not for zero terminal SNR."""
    return -level.lam * scale
