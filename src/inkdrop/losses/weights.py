"""Weights of the loss by noise level, each meant on |δx0|²: w(lam), with SNR = e^{2·lam}. Found by name.

On |δeps|² the weight w is w/SNR, on |δv|² w/(SNR + 1) where alpha² + sigma² = 1. What is minimised is the mean of
w·|δx0|² over the levels that are drawn: a weight that its paper integrates over lam needs levels uniform in lam, which
the times `loguniform` draws.
`uniform` is no function here: it alone means 1 in the target's own space.
"""

from __future__ import annotations

import torch
from torch import Tensor

from inkdrop.errors import BadArgument

__all__ = ["constant", "edm", "min_snr", "p2", "sigmoid", "snr", "truncated_snr"]


def constant(lam: Tensor) -> Tensor:
    """1: the plain error of x0. Shape (B,) as lam."""
    return torch.ones_like(lam)


def snr(lam: Tensor) -> Tensor:
    """SNR: the plain error of eps, L_simple (Ho et al. 2020, eq. 14); sigma² on |δscore|² (Song & Ermon 2019)."""
    return (2 * lam).exp()


def min_snr(lam: Tensor, *, gamma: float = 5.0) -> Tensor:
    """min(SNR, gamma): bounds the weight of nearly clean levels (Hang et al. 2023, eq. 8)."""
    if not gamma > 0:
        raise BadArgument(f"min_snr gamma: got {gamma:g}, need a positive number; try 5")
    return (2 * lam).exp().clamp(max=gamma)


def truncated_snr(lam: Tensor) -> Tensor:
    """max(SNR, 1): keeps weight on nearly pure noise (Salimans & Ho 2022, section 4)."""
    return (2 * lam).exp().clamp(min=1.0)


def p2(lam: Tensor, *, k: float = 1.0, gamma: float = 1.0) -> Tensor:
    """SNR/(k + SNR)^gamma, 1/(k + SNR)^gamma on |δeps|²: less for nearly clean levels (Choi et al. 2022).

    Args:
        lam: (B,).
        k: > 0; below SNR = k the weight is that of `snr` up to a factor.
        gamma: how strongly, ≥ 0; 0 is `snr`, and the paper takes 0.5 or 1.
    """
    if not k > 0:
        raise BadArgument(f"p2 k: got {k:g}, need a positive number; try 1")
    if not gamma >= 0:
        raise BadArgument(f"p2 gamma: got {gamma:g}, need at least 0; try 1")
    ratio = (2 * lam).exp()
    return ratio / (k + ratio) ** gamma


def edm(lam: Tensor, *, sd: float = 0.5) -> Tensor:
    """SNR + 1/sd² = (rho² + sd²)/(rho·sd)²: 1 on EDM's raw output at every level (Karras et al. 2022, table 1).

    With sd = 1 it is Salimans & Ho's SNR + 1: 1 on |δv|² where alpha² + sigma² = 1.

    Args:
        lam: (B,).
        sd: the standard deviation of the data, > 0.
    """
    if not sd > 0:
        raise BadArgument(f"edm sd: got {sd:g}, need a positive number; try 0.5, the deviation of your data")
    return (2 * lam).exp() + sd**-2


def sigmoid(lam: Tensor, *, bias: float = 2.0) -> Tensor:
    """SNR·sigmoid(bias − log SNR), a sigmoid on |δeps|²: near SNR where that is small, and never more than e^bias.

    Kingma & Gao 2023 (section 5) and Hoogeboom et al. 2024 integrate it over lam: the times `loguniform` do so too.

    Args:
        lam: (B,).
        bias: the log SNR at which half of the weight of eps is gone; less of it for larger pictures.
    """
    return (2 * lam).exp() * torch.sigmoid(bias - 2 * lam)
