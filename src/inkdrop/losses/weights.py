"""Weights of the loss by noise level, each meant on |δx0|²: w(lam), with SNR = e^{2·lam}. Found by name.

`uniform` is no function here: it alone means 1 in the target's own space.
"""

from __future__ import annotations

import torch
from torch import Tensor

from inkdrop.errors import BadArgument

__all__ = ["constant", "min_snr", "snr", "truncated_snr"]


def constant(lam: Tensor) -> Tensor:
    """1: the plain error of x0. Shape (B,) as lam."""
    return torch.ones_like(lam)


def snr(lam: Tensor) -> Tensor:
    """SNR: on a variance-preserving schedule, the plain error of eps (Ho et al. 2020's L_simple)."""
    return (2 * lam).exp()


def min_snr(lam: Tensor, *, gamma: float = 5.0) -> Tensor:
    """min(SNR, gamma): bounds the weight of nearly clean levels (Hang et al. 2023, eq. 8)."""
    if not gamma > 0:
        raise BadArgument(f"min_snr gamma: got {gamma:g}, need a positive number; try 5")
    return (2 * lam).exp().clamp(max=gamma)


def truncated_snr(lam: Tensor) -> Tensor:
    """max(SNR, 1): keeps weight on nearly pure noise (Salimans & Ho 2022, section 4)."""
    return (2 * lam).exp().clamp(min=1.0)
