"""The score-based line: the reverse SDE, predictor-corrector and annealed Langevin dynamics.

Song & Ermon 2019 and 2020, Song et al. 2021 ("Score-based generative modeling through stochastic differential
equations"). The score is ∇ log p(x) = −eps/sigma.
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor

from inkdrop.core.ask import Ask, Belief, Noise, Sampling
from inkdrop.core.grid import Grid
from inkdrop.errors import BadArgument

__all__ = ["ORDER", "annealed_langevin", "predictor_corrector", "reverse_sde", "row_norms"]

# Weak, of the moments. Langevin steps of a size that does not shrink with the grid leave a bias, so theirs have none.
ORDER = {"reverse_sde": 1, "predictor_corrector": None, "annealed_langevin": None}

Predictor = Literal["reverse_diffusion", "euler_maruyama"]


def reverse_sde(x: Tensor, grid: Grid, noise: Noise) -> Sampling:
    """Euler–Maruyama on the reverse SDE, in time (Song et al. 2021, eq. 6).

    With dx = f·x dt + g dw forwards (Schedule.rates) and d = t − s: x_s = (1 − f·d)·x − g²·d/sigma·eps + g·√d·z. Into
    the clean level it is x0, the mean of a last step that removes all noise. This is the plain method, which overshoots
    where steps are coarse: ddpm and dpmpp_2m_sde solve the same SDE better. Cost: one ask a step. Weak order 1.

    Args:
        x: (B, C, *S), at grid[0].
        grid: levels in falling order, the first with alpha > 0.
        noise: one unit normal a step, none into the clean level.

    Raises:
        BadArgument: the grid starts without signal, where f is infinite.
    """
    predictions = _predictions("reverse_sde", grid, "euler_maruyama")
    for (now, nxt), steps in zip(pairwise(grid), predictions, strict=True):
        belief = yield Ask(x, now)
        if nxt.clean:
            return belief.x0
        x = _predicted(x, belief, steps, noise(x, now, nxt))
    return x


def predictor_corrector(
    x: Tensor,
    grid: Grid,
    noise: Noise,
    *,
    snr: float = 0.16,
    corrections: int = 1,
    predictor: Predictor = "reverse_diffusion",
) -> Sampling:
    """A step down, then Langevin steps at the level reached (Song et al. 2021, algorithms 2 to 5).

    Predictor, with a = alpha_t/alpha_s and G² = sigma_t² − a²·sigma_s² of the forward step:
    x_s = (2 − a)·x − G²/sigma·eps + G·z (reverse diffusion, eq. 46), or Euler–Maruyama as in reverse_sde.
    Corrector: x ← x − e/sigma·eps + √(2·e)·z with e = 2·a²·(snr·sigma·‖z‖/‖eps‖)², norms over one row each: the papers'
    own code takes the mean over the batch, which makes an image depend on its neighbours. a² is 1 on variance-exploding
    levels (algorithm 4) and 1 − beta of the step just made on variance-preserving ones (algorithm 5, which has that of
    the step below). Into the clean level it is x0.

    Cost: 1 + corrections asks a step, one into the clean level. No order: the corrector's bias does not fall with the
    number of steps; where norms concentrate (images, not points of a plane) its variance is about 1 + snr² too large.

    Args:
        x: (B, C, *S), at grid[0].
        grid: levels in falling order, the first with alpha > 0.
        noise: 1 + corrections unit normals a step, none into the clean level; white.
        snr: their r, the corrector's ratio of drift to noise, > 0; 0.16 in the paper for CIFAR-10.
        corrections: their M, Langevin steps a level, ≥ 1.
        predictor: reverse_diffusion or euler_maruyama.

    Raises:
        BadArgument: the grid starts without signal, where neither predictor has a step.
    """
    if not 0 < snr < math.inf:
        raise BadArgument(f"predictor_corrector snr: got {snr:g}, need a positive finite number; try 0.16")
    if corrections < 1:
        raise BadArgument(f"predictor_corrector corrections: got {corrections}, need at least 1; or use reverse_sde")
    predictions = _predictions("predictor_corrector", grid, predictor)
    for (now, nxt), steps in zip(pairwise(grid), predictions, strict=True):
        belief = yield Ask(x, now)
        if nxt.clean:
            return belief.x0
        x = _predicted(x, belief, steps, noise(x, now, nxt))
        sigma, ratio = float(nxt.sigma), snr * float(now.alpha / nxt.alpha)
        for _ in range(corrections):
            eps, z = (yield Ask(x, nxt)).eps, noise(x, nxt, nxt)
            part = ratio * row_norms(z) / row_norms(eps)  # √(e/2)/sigma
            x = x - (2 * sigma * part**2) * eps + (2 * sigma * part) * z
    return x


def annealed_langevin(x: Tensor, grid: Grid, noise: Noise, *, per_level: int = 5, step_size: float = 0.062) -> Sampling:
    """Langevin dynamics at each level in turn, then one denoising step (Song & Ermon 2019, algorithm 1).

    At every noisy level, `per_level` times: x ← x − (a/2)/sigma·eps + √a·z with a = step_size·sigma². The state goes to
    the next level as it is. If the grid ends clean the result is x0, asked once more at the last noisy level
    (Jolicoeur-Martineau et al. 2021: without it, the noise of that level remains). step_size is Song & Ermon's
    ε/sigma_L²: 0.2 with 100 steps on each of 10 levels in 2019, 0.062 with 5 on each of 232 in 2020.
    It takes about 1,000 asks, on a spacing even in log-SNR (200 levels of loguniform): fewer leave noise in a picture.
    Cost: per_level asks a noisy level, and one for the clean one. No order: the stationary law of a fixed step is not p
    (on N(0, v) its variance is v/(1 − a/(4·v))), and levels must be near one another for x to keep up.

    Args:
        x: (B, C, *S), at grid[0].
        grid: levels in falling order.
        noise: per_level unit normals a noisy level; white.
        per_level: their T, ≥ 1.
        step_size: a/sigma², in (0, 4): from 4 on the noise itself would not be kept in bounds.
    """
    if per_level < 1:
        raise BadArgument(f"annealed_langevin per_level: got {per_level}, need at least 1; try 5")
    if not 0 < step_size < 4:
        raise BadArgument(f"annealed_langevin step_size: got {step_size:g}, need a number in (0, 4); try 0.062")
    for level in grid:
        if level.clean:
            break
        drift, spread = step_size / 2 * float(level.sigma), math.sqrt(step_size) * float(level.sigma)
        for _ in range(per_level):
            belief = yield Ask(x, level)
            x = x.add(belief.eps, alpha=-drift).add(noise(x, level, level), alpha=spread)
    if grid[-1].clean and len(grid) > 1:
        x = (yield Ask(x, grid[-2])).x0
    return x


def _predictions(sampler: str, grid: Grid, predictor: Predictor) -> list[tuple[float, ...]]:
    """(keep, drift, std) of each of the n steps x_s = keep·x − drift·eps + std·z."""
    if float(grid[0].alpha) == 0:
        raise BadArgument(
            f"{sampler}: this grid starts without signal (zero terminal SNR), where its step is infinite; "
            "try the grid karras, or the sampler ddpm"
        )
    now, nxt = grid.intervals()
    if predictor == "euler_maruyama":
        fall, spread = grid.schedule.rates(now.t)
        keep, var = 1 - fall * (now.t - nxt.t), spread * (now.t - nxt.t)
    elif predictor == "reverse_diffusion":
        kept = now.alpha / nxt.alpha
        keep, var = 2 - kept, now.sigma**2 - (kept * nxt.sigma) ** 2
    else:
        raise BadArgument(f"{sampler} predictor: got {predictor!r}, need reverse_diffusion or euler_maruyama")
    return list(zip(*(f.tolist() for f in (keep, var / now.sigma, var.sqrt())), strict=True))


def _predicted(x: Tensor, belief: Belief, steps: tuple[float, ...], z: Tensor) -> Tensor:
    keep, drift, std = steps
    return (keep * x).add(belief.eps, alpha=-drift).add(z, alpha=std)


def row_norms(x: Tensor) -> Tensor:
    """The Euclidean norm of each row of x (B, ...), as (B, 1, ...).

    Each is computed by itself: a reduction over many rows may add up in another order than one over a single row.
    """
    norms = torch.stack([torch.linalg.vector_norm(row) for row in torch.unbind(x)])
    return norms.reshape(-1, *(1,) * (x.ndim - 1))
