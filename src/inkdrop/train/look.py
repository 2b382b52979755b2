"""A look at a run: held-out loss, a sample grid, the colours of the samples, and what a learner should make of it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from inkdrop.core.dataset import FEW, Data, Forward
from inkdrop.evals.nearest import Copies, nearest

__all__ = ["advise", "colours", "colours_of", "copies", "copies_text", "drift", "drift_text"]

_IMAGES = 512  # of the data, by which colours are judged
_HELD_OUT = 256  # by which it is judged how near to a training image is suspicious
_ROOM = 2**28  # numbers of a training set, above which it is not searched for copies
_EARLY = 100  # updates, before which a loss says little
_FALL = 0.98  # a loss that is not below this share of the first has not fallen
_RISE = 1.02  # a loss above this share of the best has risen


def colours(x: Tensor) -> dict[str, list[float]]:
    """Mean and contrast of each channel, over images: plain JSON.

    Args:
        x: (B, C, H, W) in [-1, 1].

    Returns:
        "mean" and "std", the mean over the images of each one's own mean and standard deviation, C numbers each;
        "mean_se" and "std_se", how far those of single images scatter (standard deviation).
    """
    pixels = x.double().flatten(2)
    of = {"mean": pixels.mean(2), "std": pixels.std(2, unbiased=False)}
    found = {name: value.mean(0).tolist() for name, value in of.items()}
    return found | {f"{name}_se": value.std(0, unbiased=False).tolist() for name, value in of.items()}


def colours_of(data: Data) -> dict[str, list[float]]:
    """The colours of a data set, from 512 images at most that are evenly spread over it."""
    count = min(_IMAGES, len(data))
    return colours(data.take([i * len(data) // count for i in range(count)])[0])


def drift(x: Tensor, reference: dict[str, list[float]]) -> dict[str, Any]:
    """How far the colours of samples are from those of the data.

    Of each channel's mean and contrast, the difference beyond five standard errors of as many images as there are
    samples; 0 where there is none.

    Args:
        x: samples, (B, C, H, W).
        reference: `colours_of` the data.

    Returns:
        "mean" and "std" of the samples, "data_mean" and "data_std", and "drift", the largest such difference, in
        [0, 2].
    """
    mine = colours(x)
    beyond = [
        max(0.0, abs(a - b) - 5 * se / len(x) ** 0.5)
        for name in ("mean", "std")
        for a, b, se in zip(mine[name], reference[name], reference[f"{name}_se"], strict=True)
    ]
    short = {name: [round(v, 5) for v in mine[name]] for name in ("mean", "std")}
    theirs = {f"data_{name}": [round(v, 5) for v in reference[name]] for name in ("mean", "std")}
    return {**short, **theirs, "drift": round(max(beyond), 5)}


def drift_text(now: dict[str, Any], before: float | None) -> str | None:
    """The alarm, in words; None where the samples have the data's colours, or are coming nearer to them.

    It is given when the drift is above 0.05 at two looks and has not shrunk by a fifth in between.

    Args:
        now: what `drift` found.
        before: its "drift" at the look before; None at the first.
    """
    if before is None or min(before, now["drift"]) <= 0.05 or now["drift"] < 0.8 * before:
        return None
    sides = (" ".join(f"{v:+.2f}" for v in now[key]) for key in ("mean", "data_mean", "std", "data_std"))
    mean, data_mean, std, data_std = sides
    return (
        f"the colours of the samples drift and it is not fading: mean {mean} where the data have {data_mean}, contrast "
        f"{std} where they have {data_std}. If the next grid looks wrong too: clip samples (plan.guide=clip), take "
        "target v, or a schedule that ends in pure noise; see the page When training goes wrong"
    )


def advise(history: list[dict[str, Any]]) -> tuple[str, str] | None:
    """What the held-out losses of a run's looks mean, as (kind, text) in plain words; None where all is well.

    Args:
        history: a dict a look, oldest first, with "update" and "held_out" (the loss; missing where there was none);
            the first is that of the untrained net. Nothing is said of fewer than four, or of less than 100 updates.
    """
    seen = [(look["update"], look["held_out"]) for look in history if "held_out" in look]
    if len(seen) < 4 or seen[-1][0] < _EARLY:
        return None
    (start, first), last = seen[0], seen[-1][1]
    at, best = min(seen, key=lambda look: look[1])
    if best > _FALL * first:
        return "flat", (
            f"the loss is not falling: {last:.4f} now, {first:.4f} at update {start}. The net has learned next to "
            "nothing. Try a learning rate ten times smaller (train.lr), or ten times larger if it was small; and look "
            "at the data (inkdrop data check)"
        )
    late = [loss for _, loss in seen[-3:]]
    if late == sorted(late) and late[0] < late[-1] and last > _RISE * best:
        return "rising", (
            f"the held-out loss rises: {last:.4f} now, {best:.4f} at update {at}. The net begins to know its training "
            f"images by heart and gets worse at new ones. Stop here, or take more data, a smaller net, or dropout; the "
            f"checkpoint nearest to update {at} is the best one"
        )
    return None


def copies(x: Tensor, data: Data, held_out: Data) -> dict[str, Any] | None:
    """How near samples come to training images, beside how near held-out images do: see `evals.nearest.Copies`.

    Args:
        x: samples, (B, C, H, W).
        data: the training split.
        held_out: the other one.

    Returns:
        the report of `Copies`, with the name of the nearest training image as "nearest"; None where there are no
        held-out images, or the training set is a stream, or too large to be searched in passing (above 2²⁸ numbers).
    """
    if not len(held_out) or isinstance(data, Forward) or len(data) * x[0].numel() > _ROOM:
        return None
    count = min(_HELD_OUT, len(held_out))
    tally = Copies(nearest(held_out.take(range(count))[0], data).distance)
    tally.update(nearest(x.clamp(-1, 1).to(torch.float32), data))
    report = tally.report()
    return {**report, "nearest": data.name(report["pairs"][0]["train"])}


def copies_text(found: dict[str, Any]) -> str:
    """What `copies` found, for people; fewer than 100 held-out images cannot tell a share of 1 %."""
    n, held_out = found["n"], found["held_out_n"]
    than = "99 in 100" if held_out >= FEW else f"any of the {held_out}"
    text = (
        f"{found['copies']} of {n} samples are nearer to a training image than {than} held-out images are, the nearest "
        f"to {found['nearest']}: the net may know its training images by heart"
    )
    return text if held_out >= FEW else f"{text} (by chance alone about {n / (held_out + 1):.1f} of {n} would be so)"
