"""The forward posterior q(x_s | x_t, x0) between any two levels, and the densities of the variational bound."""

from __future__ import annotations

import math
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from inkdrop.core.level import Level
from inkdrop.errors import BadArgument

__all__ = ["Variance", "decoder_bits", "kl_normal", "mean_coefficients", "posterior_variance"]

Variance: TypeAlias = Literal["beta", "beta-tilde"]


def _kept(now: Level, nxt: Level) -> Tensor:
    """(SNR_t/SNR_s) = e^{2(lam_t − lam_s)} in [0, 1]: how much of x_s's information x_t kept. 0 into clean."""
    return (now.alpha * nxt.sigma / (nxt.alpha * now.sigma)) ** 2


def mean_coefficients(now: Level, nxt: Level) -> tuple[Tensor, Tensor]:
    """(c0, ct) of the posterior mean c0·x0 + ct·x_t of q(x_s | x_t, x0), s = nxt below t = now.

    c0 = alpha_s·(1 − r) and ct = r·alpha_s/alpha_t with r = SNR_t/SNR_s, written without a division by alpha_t
    so that alpha_t = 0 is allowed (Ho et al. 2020, eq. 7, for any pair of levels: Kingma et al. 2021, eq. 25–27).
    """
    ct = now.alpha * nxt.sigma**2 / (nxt.alpha * now.sigma**2)
    return nxt.alpha * (1 - _kept(now, nxt)), ct


def posterior_variance(now: Level, nxt: Level, choice: Variance = "beta-tilde") -> Tensor:
    """The variance of the reverse step from level t = now into s = nxt.

    beta       = sigma_t² − (alpha_t/alpha_s)²·sigma_s²,    beta-tilde = beta·sigma_s²/sigma_t²;
    both are 0 into the clean level (Ho et al. 2020, section 3.2).

    Raises:
        BadArgument: another choice.
    """
    if choice not in ("beta", "beta-tilde"):
        raise BadArgument(f"variance: got {choice!r}, need beta or beta-tilde")
    fresh = 1 - _kept(now, nxt)
    scale = now.sigma**2 if choice == "beta" else nxt.sigma**2
    return torch.where(nxt.sigma == 0, torch.zeros_like(fresh), scale * fresh)


def kl_normal(mean_a: Tensor, var_a: Tensor, mean_b: Tensor, var_b: Tensor) -> Tensor:
    """KL(N(mean_a, var_a) ‖ N(mean_b, var_b)) per element, in bits; variances > 0; shapes broadcast."""
    ratio = var_a / var_b
    return 0.5 * (ratio - 1 - ratio.log() + (mean_a - mean_b) ** 2 / var_b) / math.log(2)


def decoder_bits(x0: Tensor, mean: Tensor, std: Tensor, *, levels: int = 256) -> Tensor:
    """−log2 p(x0) of the discretised Gaussian decoder, per element, in bits (Ho et al. 2020, eq. 13).

    x0's values are `levels` equally spaced numbers in [−1, 1]; each owns the interval half a spacing to either side,
    the first and the last reaching to −∞ and +∞. Computed in float64 from log-cdf differences, so that far tails
    stay finite.

    Args:
        x0: data in [-1, 1], (B, C, *S).
        mean: of the Gaussian, broadcast to x0.
        std: of the Gaussian, > 0, broadcast to x0.
        levels: how many values a channel can take, ≥ 2.

    Returns:
        float64 of x0's shape, ≥ 0.
    """
    if levels < 2:
        raise BadArgument(f"decoder levels: got {levels}, need at least 2; try 256")
    x0, mean, std = x0.double(), mean.double(), std.double()
    half = 1 / (levels - 1)
    low = torch.where(x0 < -1 + half, -math.inf, (x0 - half - mean) / std)
    high = torch.where(x0 > 1 - half, math.inf, (x0 + half - mean) / std)
    flip = low + high > 0  # use the tail in which the two cdfs are small, where their difference is exact
    low, high = torch.where(flip, -high, low), torch.where(flip, -low, high)
    log_high, log_low = torch.special.log_ndtr(high), torch.special.log_ndtr(low)
    gap = (log_low - log_high).clamp(max=0)
    bits: Tensor = -(log_high + torch.log(-torch.expm1(gap))) / math.log(2)
    return bits
