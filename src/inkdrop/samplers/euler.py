"""Euler's method on the probability-flow ODE."""

from __future__ import annotations

from torch import Tensor

from inkdrop.core.ask import Noise, Sampling
from inkdrop.core.grid import Grid
from inkdrop.samplers.ddim import ddim

__all__ = ["ORDER", "euler"]

ORDER = 1


def euler(x: Tensor, grid: Grid, noise: Noise) -> Sampling:
    """Euler's method on the probability flow; the same numbers as ddim with eta = 0 (Karras et al. 2022, section 3).

    In z = x/alpha the flow is dz/drho = eps, and one Euler step is x_s = alpha_s·(z + (rho_s − rho_t)·eps)
    = alpha_s·x0 + sigma_s·eps. In z = x/(alpha + sigma), u = sigma/(alpha + sigma), the variables of flow matching, it
    is the same step: one implementation. Cost: one ask a step. Order 1.

    Args:
        x: (B, C, *S), at grid[0].
        grid: levels in falling order.
        noise: not used.
    """
    return (yield from ddim(x, grid, noise))
