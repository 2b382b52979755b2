"""Scales: the factor on x at the net's input, as a function of the level. Found by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import torch
from torch import Tensor

from inkdrop.core.level import Level

__all__ = ["Scale", "edm", "unit"]

Scale: TypeAlias = Callable[[Level], Tensor]
"""Level -> the factor, float64, the shape of level.alpha."""


def unit(level: Level) -> Tensor:
    """1: right for variance-preserving schedules."""
    return torch.ones_like(level.alpha)


def edm(level: Level, *, sd: float = 0.5) -> Tensor:
    """1/√(alpha²·sd² + sigma²), which gives the net's input unit variance (Karras et al. 2022, eq. 7)."""
    return ((level.alpha * sd) ** 2 + level.sigma**2).rsqrt()
