"""LMS: the linear multistep method of Adams and Bashforth in rho, and the step that DEIS and PNDM share with it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Literal, TypeAlias

from torch import Tensor

from inkdrop.core.ask import Ask, Belief, Noise, Sampling
from inkdrop.core.grid import Grid
from inkdrop.core.level import Level
from inkdrop.errors import BadArgument

__all__ = ["ORDER", "Weights", "lms", "multistep", "transfer"]

ORDER = 4

Weights: TypeAlias = Callable[[Sequence[float], float], Sequence[float]]
"""(rhos of this and of the earlier answers, latest first; rho of the next level) -> the weights of the earlier ones."""


def lms(x: Tensor, grid: Grid, noise: Noise, *, order: Literal[1, 2, 3, 4] = 4) -> Sampling:
    """Adams–Bashforth in rho with unequal steps: x_s/alpha_s = x_t/alpha_t + ∫ P(rho) drho (k-diffusion's sample_lms).

    In z = x/alpha the flow is dz/drho = eps. P is the polynomial in rho through the last `order` answers' eps, and the
    integral from rho_t to rho_s is exact. The first steps have orders 1, 2, 3, as there are answers; from alpha = 0 and
    into clean the step is ddim's. Cost: one ask a step. Order: the knob; 1 is ddim with eta = 0. See Katherine
    Crowson's k-diffusion, and Hairer, Nørsett & Wanner 1993, section III.5, for unequal steps.

    Args:
        x: (B, C, *S), at grid[0].
        grid: levels in falling order.
        noise: not used.
        order: how many answers the polynomial goes through.
    """
    if order not in (1, 2, 3, 4):
        raise BadArgument(f"lms order: got {order}, need 1, 2, 3 or 4; try 4")
    return (yield from multistep(x, grid, order, _in_rho))


def multistep(x: Tensor, grid: Grid, order: int, weights: Weights) -> Sampling:
    """The loop of lms and deis: x (B, C, *S) down the grid, each step along a weighted mean of the last eps.

    Args:
        x: at grid[0].
        grid: levels in falling order.
        order: how many answers are weighted, ≥ 1.
        weights: says how.
    """
    rhos: list[float] = []
    past: list[Tensor] = []
    for now, nxt in pairwise(grid):
        belief = yield Ask(x, now)
        if nxt.clean or float(now.alpha) == 0:
            x = transfer(belief, now, nxt)
            continue
        rhos = [float(now.rho), *rhos][:order]
        x = transfer(belief, now, nxt, past, weights(rhos, float(nxt.rho)))
        past = [belief.eps, *past][: order - 1]
    return x


def transfer(
    belief: Belief, now: Level, nxt: Level, past: Sequence[Tensor] = (), weights: Sequence[float] = ()
) -> Tensor:
    """x_s = alpha_s·(x_t/alpha_t + (rho_s − rho_t)·e), where e = (1 − Σ w_j)·eps + Σ w_j·past_j is eps over the step.

    Without weights it is ddim's alpha_s·x0 + sigma_s·eps, finite from alpha = 0 and into clean too. The weights bend
    that step: x_s = alpha_s·x0 + sigma_s·eps + c·Σ w_j·(past_j − eps) with c = sigma_s − alpha_s·rho_t.

    Args:
        belief: about x_t, (B, C, *S) each.
        now: the level t; alpha > 0 where there are weights.
        nxt: the level s.
        past: eps of other answers, (B, C, *S) each.
        weights: one each.
    """
    alpha, sigma = float(nxt.alpha), float(nxt.sigma)
    if not weights:
        return (alpha * belief.x0).add(belief.eps, alpha=sigma)
    whole = sigma - alpha * float(now.sigma) / float(now.alpha)
    bends = [whole * weight for weight in weights]
    x = (alpha * belief.x0).add(belief.eps, alpha=sigma - sum(bends))
    for bend, eps in zip(bends, past, strict=True):
        x = x.add(eps, alpha=bend)
    return x


def _in_rho(rhos: Sequence[float], to: float) -> list[float]:
    """The mean over [rho_t, rho_s] of the Lagrange polynomials in rho; Gauss's two points are exact up to cubics."""
    middle, reach = (rhos[0] + to) / 2, (rhos[0] - to) / math.sqrt(12)
    low, high = middle - reach, middle + reach
    return [(_lagrange(rhos, j, low) + _lagrange(rhos, j, high)) / 2 for j in range(1, len(rhos))]


def _lagrange(nodes: Sequence[float], j: int, at: float) -> float:
    """The polynomial that is 1 at node j and 0 at the others, at a point."""
    return math.prod((at - node) / (nodes[j] - node) for k, node in enumerate(nodes) if k != j)
