"""UniPC: a polynomial through past answers predicts, and one through the new answer besides corrects."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Literal, TypeAlias

import numpy as np
from torch import Tensor

from inkdrop.core.ask import Ask, Noise, Sampling
from inkdrop.core.grid import Grid
from inkdrop.core.level import Level
from inkdrop.errors import BadArgument

__all__ = ["ORDER", "unipc"]

Answers: TypeAlias = list[tuple[float, Tensor]]
"""(lam, x0) of some answers."""


def _order(*, predictor_order: int = 2, **_: object) -> int:
    """Zhao et al. 2023: UniP-p has order p (corollary 3.2), and UniC raises it by one (theorem 3.1)."""
    return predictor_order + 1


ORDER = _order


def unipc(
    x: Tensor,
    grid: Grid,
    noise: Noise,
    *,
    predictor_order: Literal[1, 2, 3] = 2,
    variant: Literal["b1", "b2"] = "b2",
) -> Sampling:
    """UniPC-p on the data prediction, multistep, with p = predictor_order (Zhao et al. 2023, section 3, appendix A).

    UniP-p predicts the next x from the last p answers. The answer about that x then corrects it (UniC-p), and the next
    step starts from the corrected one, so the corrector costs no question of its own. An interval from alpha = 0 is not
    corrected, nor the last. On a grid that ends clean the predictor uses no more answers than there are steps left, as
    in the paper's code, and the last step is x0. Cost: one ask a step. Order predictor_order + 1.

    Args:
        x: (B, C, *S), at grid[0].
        grid: levels in falling order.
        noise: not used.
        predictor_order: the paper's p, "solver_order" in other software.
        variant: B(h) = h (b1) or e^h − 1 (b2). It matters where there is one coefficient, which the paper sets to 1/2:
            in the predictor from two answers and the corrector from one. Where they are solved for, it cancels.
    """
    if predictor_order not in (1, 2, 3):
        raise BadArgument(f"unipc predictor_order: got {predictor_order}, need 1, 2 or 3")
    if variant not in ("b1", "b2"):
        raise BadArgument(f"unipc variant: got {variant!r}, need b1 or b2")
    past: Answers = []  # two at most, the newest first
    last: tuple[Tensor, Level, Tensor, Answers] | None = None  # the step to be corrected: x, now, x0, others
    for left, (now, nxt) in zip(range(len(grid) - 1, 0, -1), pairwise(grid), strict=True):
        lam, x0 = float(now.lam), (yield Ask(x, now)).x0
        if last is not None:
            start, before, older, others = last
            x = _step(start, before, now, older, [*others, (lam, x0)], variant)
        others = past[: (min(predictor_order, left) if grid[-1].clean else predictor_order) - 1]
        if math.isfinite(lam):
            past, last = [(lam, x0), *past[:1]], (x, now, x0, others)
        x = _step(x, now, nxt, x0, others, variant)
    return x


def _step(x: Tensor, now: Level, nxt: Level, x0: Tensor, others: Answers, variant: str) -> Tensor:
    """x' = sigma'/sigma·x − alpha'·((e^{−h} − 1)·x0 + B(−h)·Σ_k a_k/r_k·(x0_k − x0)), with x0_k at lam + r_k·h.

    Both UniP, whose r_k < 0, and UniC, whose last r_k is 1.
    """
    decay = nxt.sigma / now.sigma
    ahead = decay * x + (nxt.alpha - decay * now.alpha) * x0
    if others:
        start, h = float(now.lam), float(nxt.lam - now.lam)
        weights = _weights([(lam - start) / h for lam, _ in others], -h, variant)
        for weight, (_, other) in zip(weights, others, strict=True):
            ahead = ahead - nxt.alpha * weight * (other - x0)
    return ahead


def _weights(ratios: list[float], h: float, variant: str) -> list[float]:
    """B(h)·a_k/r_k, where Σ_k r_k^{i−1}·a_k·B(h) = i!·h·phi_{i+1}(h) for i = 1, 2, ... makes polynomials exact.

    phi_1 = (e^h − 1)/h and phi_{i+1} = (phi_i − 1/i!)/h. A single a is 1/2.
    """
    if len(ratios) == 1:
        return [0.5 * (h if variant == "b1" else math.expm1(h)) / ratios[0]]
    wanted, phi = [], math.expm1(h) / h
    for i in range(1, len(ratios) + 1):
        phi = (phi - 1 / math.factorial(i)) / h
        wanted.append(math.factorial(i) * h * phi)
    powers = np.vander(ratios, increasing=True).T
    found: list[float] = (np.linalg.solve(powers, wanted) / ratios).tolist()
    return found
