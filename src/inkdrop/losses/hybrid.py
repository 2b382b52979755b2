"""The hybrid objective: the simple one, and the variational bound for the variance that the net learns."""

from __future__ import annotations

import torch
from torch import Tensor

from inkdrop.core.ask import Ask
from inkdrop.core.cond import Cond
from inkdrop.core.forward import diffuse
from inkdrop.core.level import Level
from inkdrop.core.noise import Draw
from inkdrop.core.schedule import Schedule
from inkdrop.core.variational import step_bits, step_variance
from inkdrop.denoiser import Denoiser
from inkdrop.errors import BadArgument

__all__ = ["hybrid"]


def hybrid(
    denoiser: Denoiser, x0: Tensor, cond: Cond | None, draw: Draw, *, vlb: float = 1e-3, levels: int | None = 256
) -> dict[str, Tensor]:
    """L_simple + vlb·L_vlb, for a net with learned variance (Nichol & Dhariwal 2021, eq. 16).

    L_vlb = T·L_t at a random step t of the chain of T steps: an unbiased estimate of the bound of `evals.bound` with
    variance="learned", without its prior term, which no net can change. The net's y is held still in it, so that L_vlb
    moves the variance alone, and L_simple, mean |ŷ − y|², the mean alone.

    Args:
        denoiser: whose net is trained; it must say 2·C channels.
        x0: clean data in [-1, 1], (B, C, *S).
        cond: their conditions, some rows null.
        draw: the randomness of this batch.
        vlb: lambda, the weight of L_vlb, ≥ 0; the paper's is 0.001.
        levels: how many equally spaced values in [-1, 1] a channel of the data takes, ≥ 2; None for continuous data.

    Returns:
        "loss" (B,), "mse" (B,) the error of y, "vlb" (B,) L_vlb in bits a dimension.

    Raises:
        BadArgument: a net without learned variance, a negative weight, fewer than 2 levels, a schedule of one step.
    """
    schedule = denoiser.schedule
    _check(vlb, levels, schedule)
    step = (draw.uniform("time") * schedule.steps).floor().clamp(max=schedule.steps - 1) + 1  # 1..T
    now = schedule(step / schedule.steps)
    eps = draw.normal(x0.shape, x0.dtype).to(x0.device)
    x = diffuse(x0, eps, now)
    y, raw = denoiser.predict(Ask(x, now, cond))
    if raw is None:
        raise BadArgument(
            "loss hybrid: the net predicts no variance; build it with learned_variance=true, or try simple"
        )
    mse = (y - denoiser.target.make(x0, eps, now)).square().flatten(1).mean(1)
    expected, _ = denoiser.target.split(x, y.detach(), now)
    bits = torch.zeros_like(x0, dtype=torch.float64)
    for rows in (step == 1, step > 1):  # the decoder's term, and the others
        if rows.any():
            above, at, below = _around(schedule, step[rows], x0)
            own = rows.to(x0.device)
            var = step_variance(above, at, below, "learned", (raw[own] + 1) / 2)
            bits[own] = step_bits(x0[own].double(), expected[own].double(), var, at, below, levels)
    bound = (schedule.steps * bits.flatten(1).mean(1)).to(mse.dtype)
    return {"loss": mse + vlb * bound, "mse": mse, "vlb": bound}


def _around(schedule: Schedule, step: Tensor, x0: Tensor) -> tuple[Level, Level, Level]:
    """The levels of steps k + 1, k and k − 1, where there are such, with fields (B, 1, ...) on x0's device."""
    shape = (-1, *(1,) * (x0.ndim - 1))
    times = (k / schedule.steps for k in ((step + 1).clamp(max=schedule.steps), step, step - 1))
    above, at, below = (Level(*(f.reshape(shape).to(x0.device) for f in schedule(t))) for t in times)
    return above, at, below


def _check(vlb: float, levels: int | None, schedule: Schedule) -> None:
    if not vlb >= 0:
        raise BadArgument(f"hybrid vlb: got {vlb:g}, need at least 0; try 0.001")
    if levels is not None and levels < 2:
        raise BadArgument(f"hybrid levels: got {levels}, need at least 2, or None for continuous data")
    if schedule.steps < 2:
        raise BadArgument(
            "loss hybrid: a chain of 1 step has no beta-tilde to learn from; try a schedule of more steps"
        )
