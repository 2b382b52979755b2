"""DEIS: the exponential integrator of Adams–Bashforth kind (Zhang & Chen 2023)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

from torch import Tensor

from inkdrop.core.ask import Noise, Sampling
from inkdrop.core.grid import Grid
from inkdrop.errors import BadArgument
from inkdrop.samplers.lms import multistep

__all__ = ["ORDER", "deis"]

ORDER = 3


def deis(x: Tensor, grid: Grid, noise: Noise, *, order: Literal[1, 2, 3] = 3) -> Sampling:
    """DEIS: x_s/alpha_s = x_t/alpha_t + ∫ P(log rho) drho, P through the last eps (Zhang & Chen 2023, eq. 14, 15).

    P is the polynomial in log rho through the last `order` answers' eps ("logrho" in diffusers; the paper's tAB-DEIS
    takes any time, and log rho is the one that all schedules share), and the integral from rho_t to rho_s is in closed
    form. The first steps have orders 1 and 2; from alpha = 0 and into clean the step is ddim's. Cost: one ask a step.
    Order: the knob (the polynomial's degree plus 1); 1 is ddim with eta = 0.

    Args:
        x: (B, C, *S), at grid[0].
        grid: levels in falling order.
        noise: not used.
        order: how many answers the polynomial goes through.
    """
    if order not in (1, 2, 3):
        raise BadArgument(f"deis order: got {order}, need 1, 2 or 3; try 3")
    return (yield from multistep(x, grid, order, _in_log_rho))


def _in_log_rho(rhos: Sequence[float], to: float) -> list[float]:
    """The mean over [rho_t, rho_s], each rho alike, of the Lagrange polynomials in s = log(rho/rho_t).

    The means of s and s² are m1 = h/(e^h − 1) − 1 and m2 = −h²/(e^h − 1) − 2·m1, with h = log(rho_t/rho_s).
    """
    h = math.log(rhos[0] / to)
    m1 = h / math.expm1(h) - 1
    m2 = -(h**2) / math.expm1(h) - 2 * m1
    past = [math.log(rho / rhos[0]) for rho in rhos[1:]]
    if len(past) < 2:
        return [m1 / a for a in past]
    a, b = past
    return [(m2 - b * m1) / (a * (a - b)), (m2 - a * m1) / (b * (b - a))]
