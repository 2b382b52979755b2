"""DPM-Solver-2, the midpoint method on the probability flow, and its ancestral variant."""

from __future__ import annotations

from itertools import pairwise

from torch import Tensor

from inkdrop.core.ask import Ask, Noise, Sampling
from inkdrop.core.grid import Grid
from inkdrop.core.posterior import posterior_variance
from inkdrop.errors import BadArgument

__all__ = ["ORDER", "dpm2", "dpm2_ancestral"]

ORDER = {"dpm2": 2, "dpm2_ancestral": 2}  # the second is weak, of the marginals


def dpm2(x: Tensor, grid: Grid, noise: Noise) -> Sampling:
    """DPM-Solver-2: the midpoint method, half-way in log rho (Lu et al. 2022a, algorithm 1; k-diffusion's dpm_2).

    In z = x/alpha the flow is dz/drho = eps. With rho_m = √(rho·rho'), z_m = z + (rho_m − rho)·eps and then
    z' = z + (rho' − rho)·eps_m. Cost: two asks a step; one into the clean level, and one from alpha = 0. Order 2.

    Args:
        x: (B, C, *S), at grid[0].
        grid: levels in falling order; their midpoints are asked about besides.
        noise: not used.
    """
    return (yield from dpm2_ancestral(x, grid, noise, eta=0.0))


def dpm2_ancestral(x: Tensor, grid: Grid, noise: Noise, *, eta: float = 1.0) -> Sampling:
    """Each step dpm2 to below the next level, then fresh noise up to it (k-diffusion's dpm_2_ancestral).

    (alpha'·rho_up)² = eta²·beta-tilde, the posterior's variance, and rho_down² = rho'² − rho_up². Were the flow solved
    exactly, it would take the marginal of rho to that of rho_down and the noise take it to rho''s, so the marginals err
    as the midpoint method does. Cost: two asks a step; one into the clean level, and one from alpha = 0.
    Weak order 2, of the marginals.

    Args:
        x: (B, C, *S), at grid[0].
        grid: levels in falling order; asked about besides is √(rho·rho_down), which with eta = 1 is the next level.
        noise: one unit normal a step if eta > 0, none into the clean level.
        eta: how much of the posterior's standard deviation is fresh noise, in [0, 1]; 0 is dpm2.
    """
    if not 0 <= eta <= 1:
        raise BadArgument(f"dpm2_ancestral eta: got {eta:g}, need a number in [0, 1]; 0 is dpm2")
    now, nxt = grid.intervals()
    var = eta**2 * posterior_variance(now, nxt)
    low = (nxt.sigma**2 - var).sqrt()  # alpha'·rho_down
    rho_m = (now.rho * low / nxt.alpha).sqrt()
    middles = grid.each_at(-rho_m.log())
    scalars = zip(low.tolist(), ((now.rho * nxt.alpha - low) / rho_m).tolist(), var.sqrt().tolist(), strict=True)
    for (now, nxt), mid, (down, bend, up) in zip(pairwise(grid), middles, scalars, strict=True):
        belief = yield Ask(x, now)
        x = (float(nxt.alpha) * belief.x0).add(belief.eps, alpha=down)  # Euler's step
        if mid is not None:
            half = (float(mid.alpha) * belief.x0).add(belief.eps, alpha=float(mid.sigma))
            second = yield Ask(half, nxt if eta == 1 else mid)
            # alpha'·(rho_down − rho)·(eps_m − eps), without their cancellation
            x = x.add(second.x0 - belief.x0, alpha=bend)
        if up > 0:
            x = x.add(noise(x, now, nxt), alpha=up)
    return x
