"""DDPM: ancestral sampling of the learned reverse chain (Ho et al. 2020)."""

from __future__ import annotations

from itertools import pairwise
from typing import Literal

from torch import Tensor

from inkdrop.core.ask import Ask, Belief, Noise, Sampling
from inkdrop.core.grid import Grid
from inkdrop.core.level import Level
from inkdrop.core.posterior import mean_coefficients, posterior_variance
from inkdrop.errors import BadArgument

__all__ = ["ORDER", "ddpm"]

ORDER = 1  # weak: in the distribution, not along a path


def ddpm(
    x: Tensor, grid: Grid, noise: Noise, *, variance: Literal["beta", "beta-tilde", "learned"] = "beta-tilde"
) -> Sampling:
    """DDPM's reverse chain on any grid: x_s ~ N(c0·x0 + ct·x_t, var) (Ho et al. 2020, algorithm 2; eq. 7).

    Cost: one ask a step. Weak order 1.

    Args:
        x: (B, C, *S), at grid[0].
        grid: levels in falling order.
        noise: one unit normal a step, none into the clean level.
        variance: beta-tilde (optimal for point-mass data), beta (for unit normal data), or learned, which interpolates
            log var between the two by the net's fraction (Nichol & Dhariwal 2021, eq. 15).
    """
    if variance not in ("beta", "beta-tilde", "learned"):
        raise BadArgument(f"ddpm variance: got {variance!r}, need beta, beta-tilde or learned")
    noisier, quieter = grid.intervals()
    std = posterior_variance(noisier, quieter, "beta-tilde" if variance == "learned" else variance).sqrt()
    weights = zip(*(f.tolist() for f in (*mean_coefficients(noisier, quieter), std)), strict=True)
    for (now, nxt), (c0, ct, fixed) in zip(pairwise(grid), weights, strict=True):
        belief = yield Ask(x, now)
        x = (c0 * belief.x0).add(x, alpha=ct)
        if not nxt.clean:
            fresh = noise(x, now, nxt)
            x = x + _learned_std(belief, now, nxt) * fresh if variance == "learned" else x.add(fresh, alpha=fixed)
    return x


def _learned_std(belief: Belief, now: Level, nxt: Level) -> Tensor:
    """e^{(v·log beta + (1 − v)·log beta-tilde)/2}."""
    if belief.var_frac is None:
        raise BadArgument("ddpm variance: got 'learned', but this net does not predict a variance; try beta-tilde")
    low, high = (posterior_variance(now, nxt, choice).log() for choice in ("beta-tilde", "beta"))
    return (0.5 * (low + belief.var_frac * (high - low))).exp()
