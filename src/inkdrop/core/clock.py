"""Clocks: what a net is told about time, as a function of the level. Found by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, TypeAlias

from torch import Tensor

from inkdrop.core.level import Level

__all__ = ["Clock", "lam", "sigma", "table", "time"]

Clock: TypeAlias = Callable[[Level], Tensor]
"""Level -> a number for the net, float64, the shape of level.alpha."""


def table(level: Level, *, steps: int = 1000, rounding: Literal["none", "nearest", "down"] = "none") -> Tensor:
    """DDPM's timestep t·T − 1, in [0, T − 1]; T is the schedule's own by default.

    Args:
        level: of the question.
        steps: T.
        rounding: what a timestep between two entries becomes: itself, the nearest (half to even), or the one below, as
            some samplers of diffusers tell their nets.
    """
    clock = level.t * steps - 1
    if rounding == "none":
        return clock
    clock = (clock * 1e6).round() / 1e6  # an entry, found by its log-SNR, is itself but for float noise
    return clock.round() if rounding == "nearest" else clock.floor()


def time(level: Level, *, scale: float = 1000.0) -> Tensor:
    """Time itself, times `scale`, as flow-matching nets are told."""
    return level.t * scale


def sigma(level: Level, *, scale: float = 1000.0) -> Tensor:
    """The standard deviation of the noise, times `scale`: what nets of flow matching are told, whatever the shift."""
    return level.sigma * scale


def lam(level: Level, *, scale: float = 0.25) -> Tensor:
    """log(sigma/alpha)·scale: EDM's c_noise at 1/4 (Karras et al. 2022, table 1). Not for zero terminal SNR."""
    return -level.lam * scale
