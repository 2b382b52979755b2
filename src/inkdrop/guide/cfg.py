"""Classifier-free guidance (Ho & Salimans 2022)."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from inkdrop.core.ask import Ask, Belief, Sampling, relay
from inkdrop.core.cond import Cond
from inkdrop.core.level import Level
from inkdrop.errors import BadArgument

__all__ = ["cfg"]


def cfg(sampling: Sampling, *, scale: float = 1.0) -> Sampling:
    """Classifier-free guidance: x0 = uncond + w·(cond − uncond), and eps likewise (Ho & Salimans 2022, eq. 6).

    w = 1 is conditional and w = 0 unconditional, each asking one branch only: bit-equal to no guidance, and half the
    cost. w is the paper's w + 1, and the `guidance_scale` of most software. The learned variance kept is the
    conditional branch's. Cost: one ask of twice the rows. Place it outermost, nearest the net.

    Args:
        sampling: what to wrap.
        scale: w, ≥ 0, finite.
    """
    if not (math.isfinite(scale) and scale >= 0):
        raise BadArgument(f"cfg scale: got {scale:g}, need a finite number of at least 0; try 1 to 8")

    def before(ask: Ask) -> Ask:
        if ask.cond is None or not ask.cond.present:
            raise BadArgument(
                "cfg: there is no condition to guide by; leave guidance out, or give a model with classes a class"
            )
        if scale == 1:
            return ask
        if scale == 0:
            return ask._replace(cond=ask.cond.null())
        n = len(ask.x)
        level = ask.level if ask.level.alpha.ndim == 0 else Level.cat([ask.level, ask.level], [n, n])
        return ask._replace(x=torch.cat([ask.x, ask.x]), level=level, cond=Cond.cat([ask.cond, ask.cond.null()]))

    def after(ask: Ask, belief: Belief) -> Belief:
        if scale in (0, 1):
            return belief
        n = len(ask.x)
        x0, eps = (b[n:] + scale * (b[:n] - b[n:]) for b in (belief.x0, belief.eps))
        return Belief(
            x0,
            eps,
            None if belief.var_frac is None else belief.var_frac[:n],
            None if belief.pull is None else _mixed(belief.pull, n, scale),
        )

    return relay(sampling, before, after)


def _mixed(pull: Callable[[Tensor], Tensor], n: int, scale: float) -> Callable[[Tensor], Tensor]:
    """The pull of uncond + w·(cond − uncond), from that of both branches stacked: each gets its share of g."""

    def both(g: Tensor) -> Tensor:
        parts = pull(torch.cat([scale * g, (1 - scale) * g]))
        return parts[:n] + parts[n:]

    return both
