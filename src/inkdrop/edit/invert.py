"""Inversion: from an image back to the noise from which a deterministic sampler makes it."""

from __future__ import annotations

from itertools import pairwise
from typing import Literal, TypeAlias

from torch import Tensor

from inkdrop.core.ask import Ask, Belief, Sampling
from inkdrop.core.grid import Grid
from inkdrop.core.level import Level
from inkdrop.errors import BadArgument

__all__ = ["Method", "invert"]

Method: TypeAlias = Literal["naive", "fixed-point", "heun"]


def invert(x: Tensor, grid: Grid, *, method: Method = "fixed-point", iterations: int = 3) -> Sampling:
    """Run a grid backwards: from x at its last level, clean or not, up to the state at its first.

    In z = x/(alpha + sigma), u = sigma/(alpha + sigma), where dz/du = eps − x0 is finite at both ends, the step from
    s up to t is z_t = z_s + (u_t − u_s)·(eps − x0). The methods differ in where they ask:

    - naive: about x_s, at s: plain DDIM inversion (Song et al. 2021, section 4.3). One ask a step. Nothing can be asked
      about the clean level; there, alpha_t·x is asked about at t.
    - fixed-point: about x_t itself, by iterating x_t ← step(x_s, answer about x_t) (Pan et al. 2023, AIDI; Garibi et
      al. 2024, ReNoise). Its limit is the exact inverse of the DDIM step on this grid, also into the clean level.
      `iterations` asks a step; each reduces the error by a factor of the order of the step.
    - heun: by the mean of the answers about x_s and about where it leads, the trapezoid upwards: second order, and the
      partner of the sampler heun. Two asks a step, and `iterations` of the fixed point from the clean level.

    Round trips go down the same grid: by ddim after naive and fixed-point, by heun after heun.

    Args:
        x: (B, C, *S), at grid[-1].
        grid: levels in falling order.
        method: naive, fixed-point or heun.
        iterations: asks of the fixed point, ≥ 1.

    Raises:
        BadArgument: another method, or less than one iteration.
    """
    if method not in ("naive", "fixed-point", "heun"):
        raise BadArgument(f"invert method: got {method!r}, need naive, fixed-point or heun")
    if iterations < 1:
        raise BadArgument(f"invert iterations: got {iterations}, need at least 1; try 3")
    last: Belief | None = None
    for now, nxt in pairwise(reversed(grid)):
        if method == "fixed-point" or (method == "heun" and now.clean):
            guess = nxt.alpha * x if last is None else _climb(x, now, nxt, last)
            for _ in range(iterations):
                last = yield Ask(guess, nxt)
                guess = _climb(x, now, nxt, last)
        else:
            last = yield Ask(nxt.alpha * x, nxt) if now.clean else Ask(x, now)
            guess = _climb(x, now, nxt, last)
            if method == "heun":
                second = yield Ask(guess, nxt)
                mean = Belief(0.5 * (last.x0 + second.x0), 0.5 * (last.eps + second.eps))
                guess = _climb(x, now, nxt, mean)
        x = guess
    return x


def _climb(x: Tensor, now: Level, nxt: Level, belief: Belief) -> Tensor:
    """From now up to the noisier nxt along the slope eps − x0 of a belief, straight in z and u."""
    low, high = now.alpha + now.sigma, nxt.alpha + nxt.sigma
    return high * (x / low + (nxt.sigma / high - now.sigma / low) * (belief.eps - belief.x0))
