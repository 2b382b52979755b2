"""Colour-drift correction: each image's channels brought back to given statistics."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from inkdrop.core.ask import Ask, Sampling
from inkdrop.errors import BadArgument, BadShape
from inkdrop.guide.middleware import Dialogue, converse, deviation, over, rewritten
from inkdrop.guide.strength import strength

__all__ = ["PLACE", "drift"]

PLACE = 20


def drift(
    sampling: Sampling,
    *,
    mean: float | tuple[float, ...],
    std: float | tuple[float, ...] | None = None,
    slack: float = 0.0,
    scale: float = 1.0,
    start: float = 1.0,
    stop: float = 0.0,
) -> Sampling:
    """Colour-drift correction: x0 + k·((ŝ/s)·(x0 − m) + m̂ − x0), for each image and channel apart.

    m and s are the mean and the standard deviation of that channel over the image; m̂ is m moved into
    [mean − slack, mean + slack], and ŝ is s moved into [std − slack, std + slack], or s itself without `std`. With
    slack 0 it is AdaIN towards given statistics (Huang & Belongie 2017, eq. 8, blended as in eq. 14): every image gets
    the same mean. A slack of the spread that the means of real images have leaves those alone that have not drifted. A
    channel that is constant has no contrast to scale, and is only moved. What is guided is corrected, and what is
    corrected is clipped.

    Args:
        sampling: what to wrap, of samples with spatial axes, (B, C, *S).
        mean: of a channel of the data, or one for each channel.
        std: of a channel of the data over an image, or one for each channel, > 0; None leaves contrast alone.
        slack: how far from them an image may be, in units of the data, ≥ 0.
        scale: k in (0, 1].
        start: the correction starts at this time, in (0, 1]; 1 is noise.
        stop: and ends at this, in [0, start); 0 is clean.

    Raises:
        BadArgument: a number outside its range.
        BadShape: not one mean a channel, or samples without spatial axes.
    """
    means = torch.tensor(mean, dtype=torch.float64).reshape(-1)
    stds = None if std is None else torch.tensor(std, dtype=torch.float64).reshape(-1)
    _check(means, stds, slack, scale)
    part = strength("drift", scale=scale, rest=0.0, start=start, stop=stop)

    def answer(ask: Ask) -> Dialogue:
        belief = yield ask
        k = part(ask.level)
        if ask.of != "net" or bool((k == 0).all()):
            return belief
        m, s = _channels(means, ask.x), None if stds is None else _channels(stds, ask.x)

        def corrected(x0: Tensor) -> Tensor:
            return x0 + over(k, x0) * (_moved(x0, m, s, slack) - x0)

        return rewritten(ask, belief, corrected)

    return converse(sampling, answer)


def _check(means: Tensor, stds: Tensor | None, slack: float, scale: float) -> None:
    if not bool(means.isfinite().all()) or not len(means):
        raise BadArgument(f"drift mean: got {means.tolist()}, need finite numbers, one or one a channel")
    if stds is not None and not bool((stds.isfinite() & (stds > 0)).all()):
        raise BadArgument(f"drift std: got {stds.tolist()}, need positive finite numbers, one or one a channel")
    if not (math.isfinite(slack) and slack >= 0):
        raise BadArgument(f"drift slack: got {slack:g}, need a finite number of at least 0")
    if not 0 < scale <= 1:
        raise BadArgument(f"drift scale: got {scale:g}, need a number in (0, 1]; 1 corrects all of it")


def _channels(values: Tensor, x: Tensor) -> Tensor:
    """One number, or one a channel, shaped to meet x (B, C, *S)."""
    if x.ndim < 3:
        raise BadShape(f"drift: got samples of shape {tuple(x.shape[1:])}, need spatial axes (C, *S) to have a mean of")
    if len(values) not in (1, x.shape[1]):
        raise BadShape(f"drift: got {len(values)} numbers for {x.shape[1]} channels; give one, or one a channel")
    return values.to(x.device, x.dtype).reshape(1, -1, *(1,) * (x.ndim - 2))


def _moved(x0: Tensor, mean: Tensor, std: Tensor | None, slack: float) -> Tensor:
    """(ŝ/s)·(x0 − m) + m̂."""
    dims = tuple(range(2, x0.ndim))
    m = x0.mean(dim=dims, keepdim=True)
    moved = torch.minimum(torch.maximum(m, mean - slack), mean + slack)
    if std is None:
        return x0 - m + moved
    s = deviation(x0, dims)
    want = torch.minimum(torch.maximum(s, std - slack), std + slack)
    return (x0 - m) * torch.where(s > 0, want / s, 1) + moved
