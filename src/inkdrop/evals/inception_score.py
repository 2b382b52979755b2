"""Inception Score: sure of each image, and of all classes alike; of any classifier's probabilities."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from inkdrop.errors import BadArgument, BadShape
from inkdrop.evals.interval import parts_of

__all__ = ["InceptionScore", "Score"]


class Score(NamedTuple):
    """An Inception Score.

    Attributes:
        mean: over the splits, in [1, K].
        std: over the splits (with 1/splits, as torch-fidelity prints).
        splits: over how many; those without an image are left out.
    """

    mean: float
    std: float
    splits: int


class InceptionScore:
    """exp of the mean KL(p(y|x) ‖ p(y)) over a stream of images, in memory O(K·splits).

        IS = exp(mean_x Σ_y p(y|x) log p(y|x) − Σ_y p(y) log p(y)),   p(y) = mean_x p(y|x)

    Both terms are sums over the stream, so nothing is kept of an image. With one split the score is of all images, with
    ten their spread says how much a tenth of them varies. Each run of `splits` images in a row is dealt to the splits
    by a permutation of its own (`parts_of`): samples are mostly asked for class by class in turn, and a split that met
    one class only would score 1 whatever the images are.

    Args:
        classes: K ≥ 2, how many classes the probabilities are of.
        splits: ≥ 1.
        seed: of the permutations, in [0, 2^64).

    Attributes:
        n: how many images were seen.

    Raises:
        BadArgument: fewer than 2 classes or 1 split.

    Reference:
        Salimans et al., "Improved techniques for training GANs", 2016, section 4. Barratt & Sharma, "A note on the
        Inception Score", 2018: why it is a poor guide away from ImageNet, and does not see the data at all.
    """

    def __init__(self, classes: int, *, splits: int = 10, seed: int = 0) -> None:
        if classes < 2 or splits < 1:
            raise BadArgument(f"inception score: got {classes} classes and {splits} splits, need at least 2 and 1")
        self.n, self.seed = 0, seed
        self._sums = torch.zeros(splits, classes, dtype=torch.float64)
        self._informed = torch.zeros(splits, dtype=torch.float64)
        self._counts = torch.zeros(splits, dtype=torch.int64)

    def update(self, probabilities: Tensor, *, first: int | None = None) -> None:
        """Take in probabilities (B, K), each row ≥ 0 with sum 1.

        Args:
            probabilities: of each class.
            first: the place of the first row in the whole stream, where others read other parts of it.

        Raises:
            BadShape: another number of classes.
            BadArgument: rows that are no probabilities.
        """
        p = probabilities.detach().to("cpu", torch.float64)
        if p.ndim != 2 or p.shape[1] != self._sums.shape[1]:
            raise BadShape(f"inception score: got shape {tuple(p.shape)}, need (B, {self._sums.shape[1]})")
        if not bool(((p >= 0).all(1) & ((p.sum(1) - 1).abs() < 1e-4)).all()):
            raise BadArgument("inception score: got rows that are no probabilities, need ≥ 0 and sum 1; try softmax(1)")
        start = self.n if first is None else first
        split = parts_of(len(p), len(self._counts), self.seed, start)
        self._sums.index_add_(0, split, p)
        self._informed.index_add_(0, split, torch.xlogy(p, p).sum(1))
        self._counts += split.bincount(minlength=len(self._counts))
        self.n += len(p)

    def merge(self, other: InceptionScore) -> None:
        """Take in all that another one of as many classes and splits, and of the same seed, has seen.

        Raises:
            BadShape: other classes or splits.
            BadArgument: another seed.
        """
        if other._sums.shape != self._sums.shape:
            raise BadShape(f"inception score merge: got {tuple(other._sums.shape)}, need {tuple(self._sums.shape)}")
        if other.seed != self.seed:
            raise BadArgument(f"inception score merge: got seed {other.seed}, need {self.seed}")
        self.load({name: own + other.state_dict()[name] for name, own in self.state_dict().items()})

    def state_dict(self) -> dict[str, Tensor]:
        """All that it holds: sums, which add up."""
        return {"sums": self._sums, "informed": self._informed, "counts": self._counts}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Become what `state_dict` of one of as many classes and splits had said.

        Raises:
            BadShape: other classes or splits.
        """
        if state["sums"].shape != self._sums.shape:
            raise BadShape(f"inception score load: got {tuple(state['sums'].shape)}, need {tuple(self._sums.shape)}")
        self._sums, self._informed = state["sums"].clone(), state["informed"].clone()
        self._counts = state["counts"].clone()
        self.n = int(self._counts.sum())

    def report(self) -> Score:
        """The score.

        Raises:
            BadArgument: no image was seen.
        """
        there = self._counts > 0
        if not bool(there.any()):
            raise BadArgument("inception score: got no images, need at least 1")
        n = self._counts[there].to(torch.float64)
        share = self._sums[there] / n[:, None]
        scores = [math.exp(value) for value in (self._informed[there] / n - torch.xlogy(share, share).sum(1)).tolist()]
        values = torch.tensor(scores, dtype=torch.float64)
        return Score(float(values.mean()), float(values.std(correction=0)), len(scores))
