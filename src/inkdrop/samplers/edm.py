"""The stochastic sampler of EDM, which churns: it adds noise before each step (Karras et al. 2022)."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from inkdrop.core.ask import Ask, Noise, Sampling
from inkdrop.core.grid import Grid
from inkdrop.core.level import Level
from inkdrop.errors import BadArgument
from inkdrop.samplers.heun import trapezoid

__all__ = ["ORDER", "edm"]

ORDER = 2  # weak; of the knob `order` at its default
MOST = math.sqrt(2) - 1  # gamma at most: no more fresh noise than x has already


def edm(
    x: Tensor,
    grid: Grid,
    noise: Noise,
    *,
    churn: float = 10.0,
    low: float = 0.0,
    high: float | None = None,
    inflate: float = 1.0,
    order: Literal[1, 2] = 2,
) -> Sampling:
    """Raise the noise from rho to (1 + gamma)·rho, then step down to the next level (Karras et al. 2022, algorithm 2).

    gamma = min(churn/n, √2 − 1) over n steps where low <= rho <= high, else 0, and capped where (1 + gamma)·rho would
    lie above the schedule's noisiest level, beyond which the net knows nothing. The step is Heun's in rho, or Euler's;
    from alpha = 0 it is Euler's. The paper's churn is 30 to 80 over 256 steps, low 0.01 to 0.05, high 1 to 50, inflate
    1.003 to 1.007. Cost: two asks a step, one into the clean level and one from alpha = 0; with order 1 one.
    Weak order 2, or 1, with inflate = 1 and once churn/n is below √2 − 1; before that more steps churn more.

    Args:
        x: (B, C, *S), at grid[0].
        grid: levels in falling order; those asked about are raised from them.
        noise: one unit normal a raised step.
        churn: their S_churn, ≥ 0: how much noise is added over the whole grid; 0 is heun with space="rho".
        low: their S_tmin: the least rho at which noise is added, ≥ 0.
        high: their S_tmax: the greatest, > low; None has no limit.
        inflate: their S_noise: the standard deviation of the added noise, > 0; above 1 makes up for a net that blurs.
        order: 2 is Heun's method, 1 Euler's.
    """
    top = math.inf if high is None else high
    _check(churn, low, top, inflate, order)
    for (now, nxt), lift in zip(pairwise(grid), _lifts(grid, churn, low, top), strict=True):
        if lift is not None:
            raised, keep, std = lift
            x = (keep * x).add(noise(x, now, raised), alpha=inflate * std)
            now = raised
        if order == 2 and now.alpha > 0:
            x = yield from trapezoid(x, now, nxt, "rho")
        else:
            belief = yield Ask(x, now)
            x = (float(nxt.alpha) * belief.x0).add(belief.eps, alpha=float(nxt.sigma))
    return x


def _check(churn: float, low: float, high: float, inflate: float, order: int) -> None:
    if not 0 <= churn < math.inf:
        raise BadArgument(f"edm churn: got {churn:g}, need a finite number of at least 0; try 10, or 0 for none")
    if not 0 <= low < high:
        raise BadArgument(f"edm low, high: got {low:g}, {high:g}, need 0 <= low < high; try 0.05 and 50")
    if not 0 < inflate < math.inf:
        raise BadArgument(f"edm inflate: got {inflate:g}, need a positive finite number; try 1.003")
    if order not in (1, 2):
        raise BadArgument(f"edm order: got {order}, need 1 (Euler) or 2 (Heun)")
    if churn == 0 and (low, high, inflate) != (0, math.inf, 1):
        raise BadArgument("edm churn: got 0, with which low, high and inflate have no effect; leave them out")


class _Lift(NamedTuple):
    """The level to which a step raises its x first, and the forward step there: keep·x + std·noise."""

    level: Level
    keep: float
    std: float


def _lifts(grid: Grid, churn: float, low: float, high: float) -> list[_Lift | None]:
    """The lift of each of the n steps; None where it has none."""
    rho = grid.intervals()[0].rho
    to = (rho * (1 + min(churn / max(1, len(rho)), MOST))).clamp(max=float(grid.schedule(1.0).rho))
    up = (to > rho) & (low <= rho) & (rho <= high)
    lifts: list[_Lift | None] = []
    for now, raised in zip(grid, grid.each_at(torch.where(up, -to.log(), math.inf)), strict=False):
        if raised is None:
            lifts.append(None)
        else:
            keep = float(raised.alpha / now.alpha)
            lifts.append(_Lift(raised, keep, float((raised.sigma**2 - (keep * now.sigma) ** 2).sqrt())))
    return lifts
