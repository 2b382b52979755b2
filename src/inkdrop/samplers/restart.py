"""Restart: go back up in noise and sample a stretch of the grid again (Xu et al. 2023)."""

from __future__ import annotations

from torch import Tensor

from inkdrop.core.ask import Noise, Sampler, Sampling
from inkdrop.core.forward import step
from inkdrop.core.grid import Grid
from inkdrop.errors import BadArgument

__all__ = ["restart"]


def restart(
    sampler: Sampler, x: Tensor, grid: Grid, noise: Noise, *, low: float = 0.06, high: float = 0.3, times: int = 2
) -> Sampling:
    """Having come down to rho = low, add noise up to rho = high and come down again, `times` times (Xu et al. 2023).

    The stretch is that of the grid's own levels with low <= rho <= high; its noisier end is reached from the other by
    one step of the forward process (Xu et al. 2023, eq. 3 and algorithm 1), which contracts what the sampler has erred
    so far while the net corrects it. With times = 0, or fewer than two levels in the stretch, it is the sampler itself;
    else the sampler starts anew, without its history, at both ends of the stretch. Cost: that of the sampler on the
    grid, and `times` times that of the stretch.

    Args:
        sampler: f(x, grid, noise), deterministic in the paper.
        x: (B, C, *S), at grid[0].
        grid: levels in falling order.
        noise: one unit normal a restart, besides the sampler's own; white, for a Brownian path does not go back.
        low: their t_min, the least rho, > 0.
        high: their t_max, the greatest rho, > low.
        times: their K, ≥ 0.
    """
    if not 0 < low < high:
        raise BadArgument(f"restart low, high: got {low:g}, {high:g}, need 0 < low < high; try 0.06 and 0.3")
    if times < 0:
        raise BadArgument(f"restart times: got {times}, need at least 0")
    inside = [i for i, level in enumerate(grid) if low <= float(level.rho) <= high]
    if times == 0 or len(inside) < 2:
        return (yield from sampler(x, grid, noise))
    top, bottom = inside[0], inside[-1]
    x = yield from sampler(x, grid[: bottom + 1], noise)
    for _ in range(times):
        x = step(x, noise(x, grid[bottom], grid[top]), grid[bottom], grid[top])
        x = yield from sampler(x, grid[top : bottom + 1], noise)
    return (yield from sampler(x, grid[bottom:], noise))
