"""Checks of what enters the house, each with one clear line."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from inkdrop.core.schedule import Schedule
from inkdrop.errors import BadData, BadShape, InkdropWarning

__all__ = ["check_end", "check_range", "check_state"]


def check_range(x: Tensor, what: str, low: float = -1.0, high: float = 1.0) -> None:
    """Refuse data outside [low, high] or not finite.

    Raises:
        BadData: naming the values found.
    """
    if x.numel() == 0:
        return
    least, most = float(x.min()), float(x.max())
    if not (least >= low - 1e-6 and most <= high + 1e-6):
        raise BadData(f"{what}: got values in [{least:g}, {most:g}], need [{low:g}, {high:g}]; scale the data first")


def check_state(x: Tensor, shape: tuple[int, ...], what: str = "x") -> None:
    """Refuse a state whose rows do not have this shape (C, *S); spatial sizes are free where shape says 0.

    Raises:
        BadShape: with both shapes.
    """
    fits = x.ndim == len(shape) + 1 and all(want in (0, got) for got, want in zip(x.shape[1:], shape, strict=True))
    if not fits or not torch.is_floating_point(x):
        raise BadShape(f"{what}: got {x.dtype} {tuple(x.shape)}, need float (B, {', '.join(map(str, shape))})")


def check_end(schedule: Schedule) -> None:
    """Warn of a schedule that does not end in noise: sampling starts from pure noise, which it was never trained on."""
    end = schedule(1.0)
    if float(end.snr) > 0.05:
        warnings.warn(
            f"schedule: at t = 1 a share alpha/sigma = {float(1 / end.rho):.2g} of the signal is left, so samples "
            "will not match the data; try more steps, rescale=True, or zero_terminal=True with target v",
            InkdropWarning,
            stacklevel=2,
        )
