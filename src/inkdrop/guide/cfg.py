"""Classifier-free guidance (Ho & Salimans 2022), and what later papers added to it."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from inkdrop.core.ask import Ask, Belief, Sampling, revise
from inkdrop.core.cond import Cond
from inkdrop.core.level import Level
from inkdrop.errors import BadArgument, BadShape
from inkdrop.guide.middleware import Dialogue, blend, converse, deviation, differentiable
from inkdrop.guide.strength import Shape, Strength, strength

__all__ = ["PLACE", "cfg", "guided"]

PLACE = 50


def cfg(
    sampling: Sampling,
    *,
    scale: float = 1.0,
    negative: int | None = None,
    rescale: float = 0.0,
    start: float = 1.0,
    stop: float = 0.0,
    shape: Shape = "constant",
) -> Sampling:
    """Classifier-free guidance: x0 = uncond + w·(cond − uncond), and eps likewise (Ho & Salimans 2022, eq. 6).

    w = 1 is conditional and w = 0 unconditional, each asking one branch only: bit-equal to no guidance, and half the
    cost; outside the interval stop < t ≤ start guidance is conditional likewise (Kynkäänniemi et al. 2024, section 3).
    w is the paper's w + 1, and the `guidance_scale` of most software. With `rescale` = φ the guided x0 is multiplied by
    φ·std(cond)/std(guided) + 1 − φ, row by row (Lin et al. 2024, section 3.4, who rescale what the net says: that is x0
    for the target x0, and −x0 for v where alpha = 0). The learned variance kept is the conditional branch's. Cost: one
    ask of twice the rows.

    Beside autoguidance it mixes the net alone: the weak net is asked with the condition, or without where w = 0.

    Args:
        sampling: what to wrap.
        scale: w, ≥ 0, finite; its mean over the interval if a shape is given.
        negative: a class to steer away from, in place of the null condition ("negative prompt").
        rescale: φ in [0, 1]; 0 leaves the guided x0 as it is, 0.7 is the paper's.
        start: guidance starts at this time, in (0, 1]; 1 is noise.
        stop: and ends at this, in [0, start); 0 is clean.
        shape: of w over the interval; see `strength`.

    A condition's own `against`, a negative prompt, takes the place of the null condition.

    Raises:
        BadArgument: a number outside its range, a knob that has no effect at this scale, or no condition.
    """
    if not 0 <= rescale <= 1:
        raise BadArgument(f"cfg rescale: got {rescale:g}, need a number in [0, 1]; try 0.7")
    if rescale and scale in (0, 1):
        raise BadArgument(f"cfg rescale: got {rescale:g}, which has no effect at scale {scale:g}; try cfg.scale=3")
    if negative is not None and scale == 1:
        raise BadArgument(f"cfg negative: got {negative}, which has no effect at scale 1; try cfg.scale=3")
    how = strength("cfg", scale=scale, start=start, stop=stop, shape=shape)
    return guided(sampling, how, negative, rescale)


def guided(sampling: Sampling, weight: Strength, negative: int | Cond | None = None, rescale: float = 0.0) -> Sampling:
    """Classifier-free guidance by any strength and any negative condition: what `cfg` is made of.

    Args:
        sampling: what to wrap.
        weight: level -> w, float64 of the shape of level.t.
        negative: the class, or the condition (of one row, or of one for each), in place of the null condition.
        rescale: φ in [0, 1], as in `cfg`.
    """

    def answer(ask: Ask) -> Dialogue:
        if ask.of not in ("net", "weak"):
            return (yield ask)
        if ask.cond is None or not (ask.cond.present if isinstance(negative, Cond) else _droppable(ask.cond)):
            raise BadArgument(
                "cfg: there is no condition to guide by; leave guidance out, or give a model with classes a class"
            )
        w = weight(ask.level)
        if ask.of == "weak":  # one branch, as the net alone would be asked
            w = (w != 0).to(w.dtype)
        if bool((w == 1).all()):
            return (yield ask)
        other = _other(ask.cond, negative)
        if bool((w == 0).all()):
            return (yield ask._replace(cond=other))
        return _mix(ask, (yield _both(ask, other)), w, rescale if ask.of == "net" else 0.0)

    return converse(sampling, answer)


def _other(cond: Cond, negative: int | Cond | None) -> Cond:
    """The condition to steer away from: null, or the negative one."""
    if cond.against is not None and negative is not None:
        raise BadArgument("cfg negative: got it beside a negative prompt; give one of them")
    if cond.against is not None:
        return cond.against
    if negative is None:
        return _null(cond)
    if isinstance(negative, Cond):
        return negative.take([0] * len(cond)) if len(negative) == 1 else negative
    if cond.label is None:
        raise BadArgument(f"cfg negative: got class {negative}, but the condition has no class; leave it out")
    null = _null(cond)
    nulls = {name: rows for name, rows in null.nulls.items() if name != "label"}
    return dataclasses.replace(null, label=torch.full_like(cond.label, negative), nulls=nulls)


def _droppable(cond: Cond) -> list[str]:
    """Class, attributes and text; a picture stays, for both branches start from it."""
    return [name for name in cond.present if name != "image"]


def _null(cond: Cond) -> Cond:
    """Without class, attributes and text."""
    return cond.null(only=_droppable(cond))


def _both(ask: Ask, other: Cond) -> Ask:
    """One question of twice the rows: first with the condition, then with the other."""
    n = len(ask.x)
    level, to = (lv if lv is None or lv.alpha.ndim == 0 else Level.cat([lv, lv], [n, n]) for lv in (ask.level, ask.to))
    cond = ask.cond if ask.cond is None else Cond.cat([ask.cond, other])
    return ask._replace(x=torch.cat([ask.x, ask.x]), level=ask.level if level is None else level, to=to, cond=cond)


def _mix(ask: Ask, belief: Belief, w: Tensor, rescale: float) -> Belief:
    """The guided belief, from that of both branches stacked."""
    n = len(ask.x)

    def mixed(cond: Tensor, other: Tensor) -> Tensor:
        x0 = blend(w, cond, other)
        return _rescaled(x0, cond, rescale) if rescale else x0

    pull = belief.pull
    if pull is None:
        x0, back = mixed(belief.x0[:n], belief.x0[n:]), None
    else:
        x0, back = differentiable(mixed, belief.x0[:n], belief.x0[n:])
    made = Belief(
        x0,
        blend(w, belief.eps[:n], belief.eps[n:]),
        None if belief.var_frac is None else belief.var_frac[:n],
    )
    if pull is not None and back is not None:
        made = made._replace(pull=lambda g: sum(pull(torch.cat(back(g))).split(n), start=torch.zeros_like(g)))
    return revise(ask, made, x0) if rescale else made


def _rescaled(x0: Tensor, cond: Tensor, part: float) -> Tensor:
    """x0·(φ·std(cond)/std(x0) + 1 − φ), the deviations over all numbers of a row; a constant row stays."""
    if x0[0].numel() < 2:
        raise BadShape(
            f"cfg rescale: got rows of shape {tuple(x0.shape[1:])}, need at least 2 numbers to have a deviation"
        )
    dims = tuple(range(1, x0.ndim))
    have, want = deviation(x0, dims), deviation(cond, dims)
    ratio = torch.where(have > 0, want / have, 1)
    return x0 * (part * ratio + (1 - part))
