"""Multistep consistency sampling (Song et al. 2023)."""

from __future__ import annotations

from itertools import pairwise

from torch import Tensor

from inkdrop.core.ask import Ask, Noise, Sampling
from inkdrop.core.grid import Grid

__all__ = ["NOISE", "ORDER", "consistency"]

ORDER = None  # a map to the end has no steps to refine
NOISE = "white"


def consistency(x: Tensor, grid: Grid, noise: Noise) -> Sampling:
    """Ask for the end of the flow, x0 = f(x, t), and put fresh noise on it: x_s = alpha_s·x0 + sigma_s·z.

    For a consistency model, whose x0 is not the expected clean signal but where the probability flow takes x (Song et
    al. 2023, algorithm 1; their ε, where the flow ends, is the clean level here; latent consistency models sample the
    same, Luo et al. 2023, algorithm 3). With an exact f every level has its exact distribution; one step is f alone.
    With an ordinary denoiser it is a crude sampler whose variance stays too small. Cost: one ask a step. No order.

    Args:
        x: (B, C, *S), at grid[0].
        grid: levels in falling order.
        noise: one unit normal a step, none into the clean level.
    """
    for now, nxt in pairwise(grid):
        belief = yield Ask(x, now)
        x = nxt.alpha * belief.x0
        if not nxt.clean:
            x = x + nxt.sigma * noise(x, now, nxt)
    return x
