"""Paired bootstrap: by how much two models differ on images from the same noise."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from inkdrop.errors import BadShape
from inkdrop.evals.frechet import frechet
from inkdrop.evals.interval import Estimate, estimate, resample
from inkdrop.evals.mmd import CUBIC

__all__ = ["Redrawn", "gap", "redraw"]

_ROWS = 2000
"""So many images of each set, the first ones, are in the table of kernels."""


class Redrawn:
    """FID and KID of one model, and of each bootstrap sample of its images.

    Args:
        features: (N, D) of its images.
        real: (M, D) of held-out images, which stay as they are.
        weights: (draws, N), how often each image is in each sample: the same for all models that are compared.

    Attributes:
        value: metric -> its value on the images themselves.
        draws: metric -> (draws,), on each sample.

    Raises:
        BadShape: weights of another number of images.
    """

    def __init__(self, features: Tensor, real: Tensor, weights: Tensor) -> None:
        if weights.shape[1] != len(features):
            raise BadShape(f"bootstrap: got weights of {weights.shape[1]} images for {len(features)}")
        x, y = features.double(), real.double()
        once = torch.ones(1, len(x), dtype=torch.float64)
        self.value, self.draws = dict[str, float](), dict[str, Tensor]()
        for name, of in (("fid", _fids), ("kid", _kids)):
            self.value[name] = float(of(x, y, once)[0])
            self.draws[name] = of(x, y, weights)


def _fids(x: Tensor, y: Tensor, weights: Tensor) -> Tensor:
    """The Fréchet distance of each weighting of x to y."""
    found = []
    for w in weights:
        total = w.sum()
        mean = w @ x / total
        centred = x - mean
        found.append(frechet(mean, (centred * w[:, None]).T @ centred / (total - 1), y.mean(0), y.T.cov()))
    return torch.tensor(found, dtype=torch.float64)


def _kids(x: Tensor, y: Tensor, weights: Tensor) -> Tensor:
    """The unbiased MMD² of each weighting of x to y, pairs of an image with itself left out."""
    x, y, w = x[:_ROWS], y[:_ROWS], weights[:, :_ROWS]
    within, across, real = (CUBIC.pairs(a, b) for a, b in ((x, x), (x, y), (y, y)))
    total, same = w.sum(1), w.square().sum(1)
    own = ((w @ within * w).sum(1) - w.square() @ within.diagonal()) / (total**2 - same)
    theirs = (real.sum() - real.diagonal().sum()) / (len(y) * (len(y) - 1))
    return own + theirs - 2 * (w @ across.mean(1)) / total


def redraw(features: Sequence[Tensor], real: Tensor, *, draws: int = 200, seed: int = 0) -> list[Redrawn]:
    """Models on bootstrap samples of the same images: image i of each is from the same noise.

    Args:
        features: (N, D) of each model's images, in the order of the noise.
        real: (M, D) of held-out images.
        draws: bootstrap samples, ≥ 1.
        seed: of the samples.

    Reference:
        Efron & Tibshirani, "An introduction to the bootstrap", 1993, chapter 6.
    """
    weights = resample(len(features[0]), draws, seed)
    return [Redrawn(each, real, weights) for each in features]


def gap(a: Redrawn, b: Redrawn, metric: str) -> Estimate:
    """By how much a's metric is above b's, ± 1.96 standard deviations of the differences on the bootstrap samples.

    The images and the noise are shared, so what is hard for both cancels. It says how sure the difference of these two
    *models* is on this data set, not of their recipes.
    """
    return estimate(a.value[metric] - b.value[metric], float((a.draws[metric] - b.draws[metric]).std()))
