"""Clocks: what a net is told about time, as a function of the level. Found by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

from torch import Tensor

from inkdrop.core.level import Level

__all__ = ["Clock", "lam", "table", "time"]

Clock: TypeAlias = Callable[[Level], Tensor]
"""Level -> a number for the net, float64, the shape of level.alpha."""


def table(level: Level, *, steps: int = 1000) -> Tensor:
    """DDPM's timestep t·T − 1, in [0, T − 1] (a fraction between entries); T is the schedule's own by default."""
    return level.t * steps - 1


def time(level: Level, *, scale: float = 1000.0) -> Tensor:
    """Time itself, times `scale`, as flow-matching nets are told."""
    return level.t * scale


def lam(level: Level, *, scale: float = 0.25) -> Tensor:
    """log(sigma/alpha)·scale: EDM's c_noise at 1/4 (Karras et al. 2022, table 1). Not for zero terminal SNR."""
    return -level.lam * scale
