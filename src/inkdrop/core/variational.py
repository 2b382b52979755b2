"""One step of the reverse chain p(x_s | x_t): its variance, and what it costs of the variational bound, in bits."""

from __future__ import annotations

import math
from typing import Literal, TypeAlias

from torch import Tensor

from inkdrop.core.level import Level
from inkdrop.core.posterior import decoder_bits, kl_normal, mean_coefficients, posterior_variance
from inkdrop.errors import BadArgument

__all__ = ["Choice", "step_bits", "step_variance"]

Choice: TypeAlias = Literal["beta", "beta-tilde", "learned"]


def _into_clean(nxt: Level) -> bool:
    return bool((nxt.sigma == 0).all())


def step_variance(above: Level, now: Level, nxt: Level, choice: Choice, frac: Tensor | None = None) -> Tensor:
    """The variance of the step from level now into nxt.

    beta and beta-tilde are those of `posterior_variance`, except into clean: there beta is sigma² of the last noisy
    level, and beta-tilde, whose own is 0, is that of the step before (Nichol & Dhariwal 2021, their code). The learned
    one is beta^v · beta-tilde^{1 − v} (their eq. 15).

    Args:
        above: the level before now; it counts into clean only.
        now: noisy; 0-dim fields, or (B, 1, ...) to go with a (B, C, *S) of rows at levels of their own.
        nxt: of the same shape; clean in all rows or in none.
        choice: which.
        frac: v in [0, 1], (B, C, *S), where it is learned.

    Returns:
        float64, of the shape of the levels, or (B, C, *S) where it is learned.

    Raises:
        BadArgument: a learned variance without its fraction.
    """
    clean = _into_clean(nxt)
    high = now.sigma**2 if clean else posterior_variance(now, nxt, "beta")
    if choice == "beta":
        return high
    low = posterior_variance(above, now) if clean else posterior_variance(now, nxt)
    if choice == "beta-tilde":
        return low
    if frac is None:
        raise BadArgument("bound variance: got 'learned', but this net does not predict a variance; try beta")
    return (low.log() + frac.double() * (high.log() - low.log())).exp()


def step_bits(x0: Tensor, expected: Tensor, var: Tensor, now: Level, nxt: Level, levels: int | None) -> Tensor:
    """One term of the bound: KL(q(x_s | x_t, x0) ‖ p(x_s | x_t)), or −log2 p(x0 | x_t) into clean.

    p is N(c0·x0' + ct·x_t, var), x0' the denoiser's answer. Both means have the part ct·x_t, which cancels.

    Args:
        x0: clean data, (B, C, *S) float64.
        expected: x0', of the same shape.
        var: of p, > 0, broadcast to x0.
        now: as in step_variance.
        nxt: as in step_variance.
        levels: how many equally spaced values in [-1, 1] a channel takes; None for continuous data, whose decoder has
            a density.

    Returns:
        Bits of each dimension, (B, C, *S); ≥ 0, but for a density.

    Reference: Ho et al. 2020, eq. 5 and 13.
    """
    if not _into_clean(nxt):
        c0, _ = mean_coefficients(now, nxt)
        return kl_normal(c0 * x0, posterior_variance(now, nxt), c0 * expected, var)
    if levels is not None:
        return decoder_bits(x0, expected, var.sqrt(), levels=levels)
    return 0.5 * ((2 * math.pi * var).log() + (x0 - expected) ** 2 / var) / math.log(2)
