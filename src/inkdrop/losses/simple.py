"""The simplified objective."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Literal, TypeVar

from torch import Tensor

from inkdrop.core.ask import Ask
from inkdrop.core.cond import Cond
from inkdrop.core.forward import diffuse
from inkdrop.core.noise import Draw
from inkdrop.denoiser import Denoiser
from inkdrop.errors import BadArgument
from inkdrop.find import check_knobs, find, names
from inkdrop.losses.noise import noises
from inkdrop.losses.pairing import optimal
from inkdrop.losses.times import uniform

__all__ = ["simple"]


def simple(
    denoiser: Denoiser,
    x0: Tensor,
    cond: Cond | None,
    draw: Draw,
    *,
    weight: str = "uniform",
    weight_knobs: dict[str, Any] | None = None,
    times: str = "uniform",
    times_knobs: dict[str, Any] | None = None,
    pairing: Literal["independent", "optimal"] = "independent",
    offset: float = 0.0,
    perturb: float = 0.0,
) -> dict[str, Tensor]:
    """Mean squared error of the net's own prediction at a random level (Ho et al. 2020, eq. 14, for any target).

    loss = w(lam)/weight_from_x0 · mean |ŷ − y|², with x_t = alpha·x0 + sigma·eps, t uniform over the schedule's times.

    With target and schedule `flow` it is flow matching (Lipman et al. 2023, section 4.1) and rectified flow (Liu et al.
    2023, eq. 1); with target, schedule and scale `edm`, clock `lam` and times `lognormal`, Karras et al. 2022; with
    target `score`, schedule `edm`, times `loguniform` and weight `snr`, twice the denoising score matching of Song &
    Ermon 2019 (eq. 6).

    Args:
        denoiser: whose net is trained.
        x0: clean data in [-1, 1], (B, C, *S).
        cond: their conditions, some rows null.
        draw: the randomness of this batch.
        weight: "uniform" (1 on |δy|²), or a weight w(lam) on |δx0|² by name.
        weight_knobs: the knobs of that weight.
        times: at which levels, by name.
        times_knobs: the knobs of those times.
        pairing: "optimal" gives each row the noise that optimal transport assigns to it among the rows of the batch
            that are told the same class, so that the paths of the flow are straighter: see `losses.pairing`. It needs
            scipy.
        offset: the deviation of a noise that is one number a channel, added to eps, ≥ 0; 0.1 lets a model learn the
            mean brightness of pictures (Guttenberg 2023).
        perturb: gamma, the deviation of a noise that is added to eps in the net's input but not in its target, ≥ 0;
            0.1 makes it robust to its own errors while sampling (Ning et al. 2023, DDPM-IP).

    Returns:
        "loss" (B,), "mse" (B,) the unweighted error of y.

    Raises:
        UnknownName: no such weight or times.
        BadArgument: knobs for uniform, which has none; a net with learned variance, which this loss cannot train;
            optimal pairing where more is told than a class.
    """
    if pairing not in ("independent", "optimal"):
        raise BadArgument(f"loss pairing: got {pairing!r}, need independent or optimal")
    schedule, u = denoiser.schedule, draw.uniform("time")
    level = schedule(_chosen("times", times, times_knobs, uniform)(u, schedule))
    eps, heard = noises(draw, x0, offset=offset, perturb=perturb)
    if pairing == "optimal":
        row = optimal(x0, eps, cond)
        eps, heard = eps[row], heard[row]
    y, variance = denoiser.predict(Ask(diffuse(x0, heard, level), level, cond))
    if variance is not None:
        raise BadArgument(
            "loss simple: cannot train a learned variance; build the net with learned_variance=false, or try hybrid"
        )
    mse = (y - denoiser.target.make(x0, eps, level)).square().flatten(1).mean(1)
    w = _chosen("weights", weight, weight_knobs, None)
    if w is None:
        return {"loss": mse, "mse": mse}
    factor = (w(level.lam) / denoiser.target.weight_from_x0(level)).to(mse.device, mse.dtype)
    return {"loss": factor * mse, "mse": mse}


_Function = TypeVar("_Function", bound=Callable[..., Tensor] | None)


def _chosen(room: str, name: str, given: dict[str, Any] | None, plain: _Function) -> Callable[..., Tensor] | _Function:
    """The function of this name with its knobs filled in; `plain` where it is "uniform", which has none."""
    if name != "uniform":
        function = find(room, name)
        return partial(function, **check_knobs(name, function, given or {}))
    if given:
        what = "times" if room == "times" else "weight"
        raise BadArgument(
            f"loss {what} uniform: has no knobs, got {', '.join(given)}; try {what} {' or '.join(names(room))}"
        )
    return plain
