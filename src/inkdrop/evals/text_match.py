"""Text match: how well samples show what they were told, by a judge of pictures and texts, beside real pictures."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from inkdrop.core.dataset import Data
from inkdrop.errors import BadArgument
from inkdrop.evals.interval import estimate, wilson
from inkdrop.evals.stream import chunk_rows, cut, subset

__all__ = ["Match", "text_match"]


@dataclass(frozen=True)
class Match:
    """A judge of pictures and texts.

    Attributes:
        name: of the judge.
        hash: of all that its scores depend on besides its name.
        note: what a score is.
        score: f(x (B, C, H, W) in [-1, 1], B texts) -> (B,), the higher the better; pictures do not see one another.
    """

    name: str
    hash: str
    note: str
    score: Callable[[Tensor, Sequence[str]], Tensor]


def text_match(match: Match, made: Tensor, test: Data, *, seed: int = 0) -> dict[str, Any]:
    """The scores of samples, of as many held-out pictures by their own captions, and of those by others' captions.

    The last are the floor: what a model that does not hear its text would have, were its pictures real.

    Args:
        match: the judge.
        made: its scores of the samples by the texts that they were told, (N,), N ≥ 2.
        test: held-out pictures with captions (`texts`).
        seed: of the choice of held-out pictures, in [0, 2^64).

    Returns:
        Plain JSON: name, hash, note, and of samples, real and others each value (the mean), low and high (95 % over
        pictures: Wilson's where scores are 0 or 1, else Student's t), n.

    Raises:
        BadArgument: fewer than 2 samples, or held-out pictures without two different captions.
    """
    if made.ndim != 1 or len(made) < 2:
        raise BadArgument(f"text match: got scores of shape {tuple(made.shape)}, need (N,) of at least 2 samples")
    known: Sequence[str | None] = getattr(test, "texts", None) or ()
    usable = [row for row, text in enumerate(known) if text]
    rows = [usable[i] for i in subset(len(usable), len(made), seed=seed, draw=2)]
    texts = [str(known[row]) for row in rows]
    if len({*texts}) < 2:
        raise BadArgument(f"text match: got {len({*texts})} captions of held-out pictures, need two that differ")
    others, found = _others(texts), (list[Tensor](), list[Tensor]())
    for part in cut(range(len(rows)), chunk_rows(test.shape)):
        x = test.take([rows[i] for i in part])[0]
        for kept, said in zip(found, (texts, others), strict=True):
            kept.append(match.score(x, [said[i] for i in part]))
    sides = {"samples": made, "real": torch.cat(found[0]), "others": torch.cat(found[1])}
    about = {"name": match.name, "hash": match.hash, "note": match.note}
    return {**about, **{side: _mean(scores.double()) for side, scores in sides.items()}}


def _others(texts: Sequence[str]) -> list[str]:
    """For each text the next one that is not the same, from the first again after the last."""
    turned = [*texts, *texts]
    return [next(other for other in turned[i + 1 :] if other != text) for i, text in enumerate(texts)]


def _mean(scores: Tensor) -> dict[str, float | int]:
    """The mean of scores, and its interval over pictures."""
    n, value = len(scores), float(scores.mean())
    if bool(((scores == 0) | (scores == 1)).all()):
        low, high = wilson(int(scores.sum()), n)
    else:
        around = estimate(value, float(scores.std()) / n**0.5, n - 1)
        low, high = around.low, around.high
    return {"value": value, "low": low, "high": high, "n": n}
