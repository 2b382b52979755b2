"""Euler's method on the probability-flow ODE, and its ancestral variant, which adds fresh noise."""

from __future__ import annotations

from torch import Tensor

from inkdrop.core.ask import Noise, Sampling
from inkdrop.core.grid import Grid
from inkdrop.errors import BadArgument
from inkdrop.samplers.ddim import ddim

__all__ = ["ORDER", "euler", "euler_ancestral"]

ORDER = 1  # weak for euler_ancestral: in the distribution, not along a path


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


def euler_ancestral(x: Tensor, grid: Grid, noise: Noise, *, eta: float = 1.0) -> Sampling:
    """Ancestral Euler: a step down to rho_down, then fresh noise up to rho_s; the same numbers as ddim with this eta.

    rho_up = eta·rho_s·√(1 − (rho_s/rho_t)²) and rho_down = √(rho_s² − rho_up²) (k-diffusion's sample_euler_ancestral;
    Song et al. 2021, score SDE, appendix F). In z = x/alpha the step is z + (rho_down − rho_t)·eps + rho_up·noise, so
    x_s = alpha_s·x0 + alpha_s·rho_down·eps + alpha_s·rho_up·noise, and (alpha_s·rho_up)² = eta²·beta-tilde: DDIM's step
    (Song et al. 2021, eq. 12). Cost: one ask a step. Weak order 1.

    Args:
        x: (B, C, *S), at grid[0].
        grid: levels in falling order.
        noise: one unit normal a step if eta > 0, none into the clean level.
        eta: how much of the posterior's standard deviation is fresh noise, in [0, 1]; 0 is euler, 1 is DDPM.
    """
    if not 0 <= eta <= 1:
        raise BadArgument(f"euler_ancestral eta: got {eta:g}, need a number in [0, 1]; 0 is euler, 1 is DDPM")
    return (yield from ddim(x, grid, noise, eta=eta))
