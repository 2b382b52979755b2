"""Static clipping of the predicted clean signal."""

from __future__ import annotations

import math

from inkdrop.core.ask import Ask, Belief, Sampling, relay
from inkdrop.errors import BadArgument
from inkdrop.guide.middleware import rewritten

__all__ = ["PLACE", "clip"]

PLACE = 10


def clip(sampling: Sampling, *, low: float = -1.0, high: float = 1.0) -> Sampling:
    """Clip x0 to [low, high] and recompute eps to agree (Ho et al. 2020, their code; Saharia et al. 2022, static).

    On by default for bundles of pixels with a declared range: without it the first step of a cosine table, whose
    alpha(1) = 5e-5, amplifies the net's error 20,000-fold. It stands next to the sampler, so that what is guided is
    clipped.

    Args:
        sampling: what to wrap.
        low: the least value of clean data.
        high: the greatest.
    """
    if not (math.isfinite(low) and math.isfinite(high) and low < high):
        raise BadArgument(f"clip: got [{low:g}, {high:g}], need low < high, both finite; try -1 and 1")

    def after(ask: Ask, belief: Belief) -> Belief:
        return rewritten(ask, belief, lambda x0: x0.clamp(low, high)) if ask.of == "net" else belief

    return relay(sampling, lambda ask: ask, after)
