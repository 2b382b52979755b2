"""DPM-Solver++: exponential integrators of the probability flow in lam, on the data prediction (Lu et al. 2022b).

With lam = log(alpha/sigma) and h = lam' − lam the flow is, exactly (their proposition 4.1),
x' = sigma'/sigma·x + alpha'·∫_0^h e^{−(h − s)}·x0(lam + s) ds, and the solvers differ in what they take for x0 there.
A constant gives alpha'·(1 − e^{−h}) = alpha' − sigma'/sigma·alpha times it, which is Euler's step in rho, and DDIM's.
"""

from __future__ import annotations

import math
from itertools import pairwise

from torch import Tensor

from inkdrop.core.ask import Ask, Noise, Sampling
from inkdrop.core.grid import Grid

__all__ = ["ORDER", "dpmpp_2m", "dpmpp_2s", "dpmpp_3m"]

ORDER = {"dpmpp_2s": 2, "dpmpp_2m": 2, "dpmpp_3m": 3}


def dpmpp_2s(x: Tensor, grid: Grid, noise: Noise) -> Sampling:
    """DPM-Solver++(2S): x0 is constant, that at the midpoint in lam (Lu et al. 2022b, algorithm 1 with r = 1/2).

    u = Euler's step to (lam + lam')/2;  x' = sigma'/sigma·x + alpha'·(1 − e^{−h})·x0(u).
    Cost: two asks a step; one into the clean level, and one from alpha = 0. Order 2.

    Args:
        x: (B, C, *S), at grid[0].
        grid: levels in falling order; their midpoints are asked about besides.
        noise: not used.
    """
    noisier, quieter = grid.intervals()
    for (now, nxt), mid in zip(pairwise(grid), grid.each_at((noisier.lam + quieter.lam) / 2), strict=True):
        x0, eps = (yield Ask(x, now))[:2]
        if mid is not None:
            x0 = (yield Ask(mid.alpha * x0 + mid.sigma * eps, mid)).x0
        decay = nxt.sigma / now.sigma
        x = decay * x + (nxt.alpha - decay * now.alpha) * x0
    return x


def dpmpp_2m(x: Tensor, grid: Grid, noise: Noise) -> Sampling:
    """DPM-Solver++(2M): x0 is constant, on the line through two answers at lam + h/2 (Lu et al. 2022b, algorithm 2).

    D = x0 + h/(2·h_old)·(x0 − x0_old);  x' = sigma'/sigma·x + alpha'·(1 − e^{−h})·D.
    The first step, and the one into the clean level, take D = x0. Cost: one ask a step. Order 2.

    Args:
        x: (B, C, *S), at grid[0].
        grid: levels in falling order.
        noise: not used.
    """
    older, h_old = None, math.inf
    for now, nxt in pairwise(grid):
        x0 = d = (yield Ask(x, now)).x0
        h = float(nxt.lam - now.lam)
        if older is not None and not nxt.clean:
            d = x0 + h / (2 * h_old) * (x0 - older)
        decay = nxt.sigma / now.sigma
        x = decay * x + (nxt.alpha - decay * now.alpha) * d
        older, h_old = x0, h
    return x


def dpmpp_3m(x: Tensor, grid: Grid, noise: Noise) -> Sampling:
    """DPM-Solver++ of third order, multistep: x0 is the parabola through the last three answers (Lu et al. 2022b).

    With x0 + slope·s + curve·s·(s + h_old) at lam + s, phi1 = 1 − e^{−h}, phi2 = 1 − phi1/h, phi3 = 1/2 − phi2/h,
    x' = sigma'/sigma·x + alpha'·(phi1·x0 + phi2·h·slope + (2·phi3·h² + phi2·h·h_old)·curve).
    The paper has the orders 1 and 2 and leaves this one to its code. That weighs s² by phi3·h² where 2·phi3·h² belongs,
    as do the implementations that took it over, which leaves theirs of order 2.
    The first step takes a constant, the second a line, the one into the clean level x0.
    Cost: one ask a step. Order 3.

    Args:
        x: (B, C, *S), at grid[0].
        grid: levels in falling order.
        noise: not used.
    """
    older = slope_old = None
    h_old = h_older = math.inf
    for now, nxt in pairwise(grid):
        x0 = (yield Ask(x, now)).x0
        h = float(nxt.lam - now.lam)
        decay = nxt.sigma / now.sigma
        x = decay * x + (nxt.alpha - decay * now.alpha) * x0
        if older is not None and not nxt.clean:
            phi2 = 1 + math.expm1(-h) / h
            slope = (x0 - older) / h_old
            x = x + nxt.alpha * phi2 * h * slope
            if slope_old is not None:
                curve = (slope - slope_old) / (h_old + h_older)
                x = x + nxt.alpha * ((1 - 2 * phi2 / h) * h**2 + phi2 * h * h_old) * curve
            slope_old = slope
        older, h_old, h_older = x0, h, h_old
    return x
