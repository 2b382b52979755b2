"""Heun's second-order method on the probability-flow ODE (Karras et al. 2022)."""

from __future__ import annotations

from itertools import pairwise
from typing import Literal

from torch import Tensor

from inkdrop.core.ask import Ask, Noise, Sampling
from inkdrop.core.grid import Grid
from inkdrop.core.level import Level
from inkdrop.errors import BadArgument

__all__ = ["FAR", "ORDER", "heun", "trapezoid"]

ORDER = 2
FAR = 1000.0  # rho beyond which x holds no signal, and half of a step in rho would be spent on nothing


def heun(x: Tensor, grid: Grid, noise: Noise, *, space: Literal["u", "rho"] = "u") -> Sampling:
    """Heun's method (explicit trapezoid) on the probability flow (Karras et al. 2022, algorithm 1).

    In z = x/(alpha + sigma) and u = sigma/(alpha + sigma) the flow is dz/du = eps − x0, finite at both ends, also where
    alpha = 0. With space="rho" it is z = x/alpha, dz/drho = eps, as in EDM's own sampler; from beyond rho = 1,000,
    where a cosine table starts, that step is Euler's.
    Cost: two asks a step, one for the step into the clean level (2n − 1 in all). Order 2.

    Args:
        x: (B, C, *S), at grid[0].
        grid: levels in falling order.
        noise: not used.
        space: the variables in which the step is straight.
    """
    if space not in ("u", "rho"):
        raise BadArgument(f"heun space: got {space!r}, need u or rho")
    if space == "rho" and float(grid[0].alpha) == 0:
        raise BadArgument("heun space: rho is infinite at the start of this grid (zero terminal SNR); try space=u")
    for now, nxt in pairwise(grid):
        x = yield from trapezoid(x, now, nxt, space)
    return x


def trapezoid(x: Tensor, now: Level, nxt: Level, space: Literal["u", "rho"]) -> Sampling:
    """One step of Heun's method, x (B, C, *S) from now to nxt: Euler's, then the mean of the slopes at both ends.

    Cost: two asks, one into the clean level.
    """
    belief = yield Ask(x, now)
    alpha, sigma = float(nxt.alpha), float(nxt.sigma)
    ahead = (alpha * belief.x0).add(belief.eps, alpha=sigma)  # Euler's step, which is ddim's in either space
    if sigma == 0 or (space == "rho" and float(now.rho) > FAR):
        return ahead
    second = yield Ask(ahead, nxt)
    if space == "rho":
        half = 0.5 * alpha * float(nxt.rho - now.rho)
        return ahead.add(second.eps - belief.eps, alpha=half)
    half = 0.5 * (sigma - (alpha + sigma) * float(now.sigma / (now.alpha + now.sigma)))
    return ahead.add((second.eps - second.x0) - (belief.eps - belief.x0), alpha=half)
