"""The simplified objective."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from inkdrop.core.ask import Ask
from inkdrop.core.cond import Cond
from inkdrop.core.forward import diffuse
from inkdrop.core.noise import Draw
from inkdrop.denoiser import Denoiser
from inkdrop.errors import BadArgument
from inkdrop.find import check_knobs, find, names

__all__ = ["simple"]


def simple(
    denoiser: Denoiser,
    x0: Tensor,
    cond: Cond | None,
    draw: Draw,
    *,
    weight: str = "uniform",
    weight_knobs: dict[str, Any] | None = None,
) -> dict[str, Tensor]:
    """Mean squared error of the net's own prediction at a random level (Ho et al. 2020, eq. 14, for any target).

    loss = w(lam)/weight_from_x0 · mean |ŷ − y|², with x_t = alpha·x0 + sigma·eps, t uniform over the schedule's times.

    Args:
        denoiser: whose net is trained.
        x0: clean data in [-1, 1], (B, C, *S).
        cond: their conditions, some rows null.
        draw: the randomness of this batch.
        weight: "uniform" (1 on |δy|²), or a weight w(lam) on |δx0|² by name.
        weight_knobs: the knobs of that weight.

    Returns:
        "loss" (B,), "mse" (B,) the unweighted error of y.

    Raises:
        UnknownName: no such weight.
        BadArgument: knobs for uniform, which has none; a net with learned variance, which this loss cannot train.
    """
    level = denoiser.schedule(denoiser.schedule.pick(draw.uniform("time")))
    eps = draw.normal(x0.shape, x0.dtype).to(x0.device)
    y, variance = denoiser.predict(Ask(diffuse(x0, eps, level), level, cond))
    if variance is not None:
        raise BadArgument("loss simple: cannot train a learned variance; build the net with learned_variance=false")
    mse = (y - denoiser.target.make(x0, eps, level)).square().flatten(1).mean(1)
    if weight == "uniform":
        if weight_knobs:
            raise BadArgument(
                f"loss weight uniform: has no knobs, got {', '.join(weight_knobs)}; "
                f"try weight {' or '.join(names('weights'))}"
            )
        return {"loss": mse, "mse": mse}
    function = find("weights", weight)
    w = function(level.lam, **check_knobs(weight, function, weight_knobs or {}))
    factor = (w / denoiser.target.weight_from_x0(level)).to(mse.device, mse.dtype)
    return {"loss": factor * mse, "mse": mse}
