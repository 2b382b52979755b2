"""Dynamic thresholding of the predicted clean signal (Saharia et al. 2022)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from inkdrop.core.ask import Ask, Belief, Sampling, relay
from inkdrop.errors import BadArgument
from inkdrop.guide.middleware import rewritten

__all__ = ["PLACE", "threshold"]

PLACE = 10


def threshold(
    sampling: Sampling, *, percentile: float = 0.995, bound: float = 1.0, most: float | None = None
) -> Sampling:
    """Dynamic thresholding: x0 clipped to [−s, s] and multiplied by bound/s, s = max(bound, percentile of |x0|).

    (Saharia et al. 2022, section 2.3; their code's bound is 1.) The percentile is of each row's own numbers, linear
    between two of them. Strong guidance saturates pixels, which clipping leaves at the bound; this pulls the whole row
    back instead. In place of clip, next to the sampler, so that what is guided is thresholded.

    Args:
        sampling: what to wrap.
        percentile: in (0, 1]; at 1 nothing is clipped and all is scaled by the greatest.
        bound: the greatest size of a value of clean data, which is symmetric about 0; > 0.
        most: the greatest that s may be, ≥ bound; None for any (1.5 in DeepFloyd's IF).
    """
    if not 0 < percentile <= 1:
        raise BadArgument(f"threshold percentile: got {percentile:g}, need a number in (0, 1]; try 0.995")
    if not (math.isfinite(bound) and bound > 0):
        raise BadArgument(f"threshold bound: got {bound:g}, need a positive finite number; try 1")
    if most is not None and not most >= bound:
        raise BadArgument(f"threshold most: got {most:g}, need at least the bound, {bound:g}; try 1.5")

    def bounded(x0: Tensor) -> Tensor:
        s = _percentile(x0.abs().flatten(1), percentile).clamp(bound, most).reshape(-1, *(1,) * (x0.ndim - 1))
        return torch.minimum(torch.maximum(x0, -s), s) * (bound / s)

    def after(ask: Ask, belief: Belief) -> Belief:
        return rewritten(ask, belief, bounded) if ask.of == "net" else belief

    return relay(sampling, lambda ask: ask, after)


def _percentile(x: Tensor, part: float) -> Tensor:
    """The quantile of each row of (B, N), linear between neighbours: (B,); torch.quantile's, of any size."""
    place = part * (x.shape[1] - 1)
    low = int(place)
    ordered = x.sort(dim=1).values
    below, above = ordered[:, low], ordered[:, min(low + 1, x.shape[1] - 1)]
    return below + (place - low) * (above - below)
