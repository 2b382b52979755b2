"""The forward process: data become noise, step by step or in one jump."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from inkdrop.core.level import Level
from inkdrop.errors import BadArgument

__all__ = ["chain_agrees", "diffuse", "step"]


def diffuse(x0: Tensor, eps: Tensor, level: Level) -> Tensor:
    """The closed-form jump x_t = alpha·x0 + sigma·eps (Ho et al. 2020, eq. 4).

    Args:
        x0: clean data, (B, C, *S).
        eps: unit normal noise of the same shape.
        level: 0-dim, or one level a row.
    """
    lv = level.over(x0)
    return lv.alpha * x0 + lv.sigma * eps


def step(x: Tensor, eps: Tensor, now: Level, nxt: Level) -> Tensor:
    """One step of the chain towards noise, from level s = now to t = nxt.

    x_t = a·x_s + √(sigma_t² − a²·sigma_s²)·eps with a = alpha_t/alpha_s (Ho et al. 2020, eq. 2, where a = √(1 − beta)).

    Raises:
        BadArgument: the next level is less noisy than this one.
    """
    keep = nxt.alpha / now.alpha
    var = nxt.sigma**2 - (keep * now.sigma) ** 2
    if bool((var < -1e-12).any()):
        raise BadArgument("forward step: the next level is less noisy than this one; go towards t = 1")
    factors = now._replace(alpha=keep, sigma=var.clamp(min=0).sqrt()).over(x)  # cast after the subtraction, not before
    return factors.alpha * x + factors.sigma * eps


def chain_agrees(levels: list[Level]) -> tuple[Tensor, Tensor]:
    """How far the chain through these levels is from the closed-form jump to the last, exactly.

    The chain is linear and Gaussian, so its law at the end is N(a·x0, s²) with a the product of the steps' factors
    and s² their accumulated variance: no sampling is needed to compare it with N(alpha·x0, sigma²).

    Args:
        levels: from clean to noise, 0-dim each; the first must be clean.

    Returns:
        (|a − alpha|, |s² − sigma²|) at the last level, each a 0-dim float64.
    """
    if len(levels) < 2 or not levels[0].clean:
        raise BadArgument("forward chain: need at least 2 levels, the first of them clean")
    scale, var = levels[0].alpha, torch.zeros_like(levels[0].alpha)
    zero = torch.zeros(1, dtype=torch.float64)
    one = torch.ones(1, dtype=torch.float64)
    for now, nxt in pairwise(levels):
        factor = step(one, zero, now, nxt)[0]
        fresh = step(zero, one, now, nxt)[0]
        scale, var = factor * scale, factor**2 * var + fresh**2
    return (scale - levels[-1].alpha).abs(), (var - levels[-1].sigma ** 2).abs()
