"""DDIM: non-Markovian sampling, from deterministic to DDPM (Song et al. 2021)."""

from __future__ import annotations

from itertools import pairwise

from torch import Tensor

from inkdrop.core.ask import Ask, Noise, Sampling
from inkdrop.core.grid import Grid
from inkdrop.core.posterior import posterior_variance
from inkdrop.errors import BadArgument

__all__ = ["ORDER", "ddim"]

ORDER = 1


def ddim(x: Tensor, grid: Grid, noise: Noise, *, eta: float = 0.0) -> Sampling:
    """DDIM: x_s = alpha_s·x0 + √(sigma_s² − var)·eps + √var·noise, var = eta²·beta-tilde (Song et al. 2021, eq. 12).

    Cost: one ask a step. Order 1. eta = 0 is deterministic, and Euler's method in rho = sigma/alpha; eta = 1 is DDPM
    with the posterior variance, on every grid.

    Args:
        x: (B, C, *S), at grid[0].
        grid: levels in falling order.
        noise: one unit normal a step if eta > 0, none into the clean level.
        eta: how much of the posterior's standard deviation is fresh noise, in [0, 1].
    """
    if not 0 <= eta <= 1:
        raise BadArgument(f"ddim eta: got {eta:g}, need a number in [0, 1]; 0 is deterministic, 1 is DDPM")
    noisier, quieter = grid.intervals()
    var = eta**2 * posterior_variance(noisier, quieter)
    weights = zip(quieter.alpha.tolist(), (quieter.sigma**2 - var).sqrt().tolist(), var.sqrt().tolist(), strict=True)
    for (now, nxt), (alpha, sigma, std) in zip(pairwise(grid), weights, strict=True):
        belief = yield Ask(x, now)
        x = (alpha * belief.x0).add(belief.eps, alpha=sigma)
        if std > 0:
            x = x.add(noise(x, now, nxt), alpha=std)
    return x
