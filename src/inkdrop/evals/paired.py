"""Paired bootstrap: by how much two models differ on images from the same noise."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from inkdrop.errors import BadShape
from inkdrop.evals.interval import Estimate, estimate, resample
from inkdrop.evals.mmd import CUBIC
from inkdrop.evals.stream import subset

__all__ = ["gap", "redraw"]

_ROWS = 10_000
"""KID is of so many images of each set at most, chosen at random, as that of `score` is."""

_CHUNK = 1024


def redraw(
    features: Sequence[Tensor], real: Tensor, *, draws: int = 200, seed: int = 0, rows: int = _ROWS
) -> list[dict[str, Tensor]]:
    """FID and KID of models on bootstrap samples of the same images: image i of each is from the same noise.

    Args:
        features: (N, D) of each model's images, in the order of the noise, N ≥ 2.
        real: (M, D) of held-out images, which stay as they are, M ≥ 2.
        draws: bootstrap samples, ≥ 1.
        seed: of the samples.
        rows: images of each set that KID is of, at most.

    Returns:
        For each model "fid" and "kid", float64 (draws,) each, fewer where a sample of few images was one image
        alone; "kid" without the pairs of held-out images, whose part is the same in all.

    Raises:
        BadShape: not equally many images of all models.

    Cost: a draw of FID takes the eigenvalues of a matrix of min(N, D, M) rows; KID N² + N·M kernels in chunks.

    Reference:
        Efron & Tibshirani, "An introduction to the bootstrap", 1993, chapter 6.
    """
    if len({len(each) for each in features}) > 1:
        raise BadShape(f"bootstrap: got {', '.join(str(len(each)) for each in features)} images, need equally many")
    weights, y = resample(len(features[0]), draws, seed), real.double()
    weights = weights[(weights > 0).sum(1) > 1]
    mean, factor = y.mean(0), _factor(y)
    mine, theirs = (subset(len(x), rows, seed=seed, draw=draw) for x, draw in ((features[0], 5), (y, 6)))
    return [
        {"fid": _fids(x, mean, factor, weights), "kid": _kids(x[mine], y[theirs], weights[:, mine])}
        for x in (each.double() for each in features)
    ]


def _factor(y: Tensor) -> Tensor:
    """F (D, min(M, D)) with F·Fᵀ the covariance of y (M, D)."""
    if len(y) < y.shape[1]:
        factor: Tensor = (y - y.mean(0)).T / (len(y) - 1) ** 0.5
    else:
        values, vectors = torch.linalg.eigh(y.T.cov())
        factor = vectors * values.clamp(min=0).sqrt()
    return factor


def _fids(x: Tensor, mean: Tensor, factor: Tensor, weights: Tensor) -> Tensor:
    """The Fréchet distance of each weighting of x, of covariance A, to a mean and a covariance F·Fᵀ.

    tr (A^{1/2}·F·Fᵀ·A^{1/2})^{1/2} is the sum of the singular values of C·F, where Cᵀ·C = A and C has a row an image.
    """
    middle = x.mean(0)
    x = x - middle
    squares, seen, found = x.square().sum(1), x @ factor, []
    for w in weights:
        total, there = w.sum(), w > 0
        shift = w @ x / total
        c = (seen[there] - shift @ factor) * (w[there] / (total - 1)).sqrt()[:, None]
        inner = c @ c.T if len(c) < c.shape[1] else c.T @ c
        overlap = torch.linalg.eigvalsh(inner).clamp(min=0).sqrt().sum()
        spread = (w @ squares - total * shift.square().sum()) / (total - 1)
        found.append((middle + shift - mean).square().sum() + spread + factor.square().sum() - 2 * overlap)
    return torch.stack(found)


def _kids(x: Tensor, y: Tensor, weights: Tensor) -> Tensor:
    """The unbiased MMD² of each weighting of x to y, without the pairs within y, and of x with itself."""
    pairs, across = weights.new_zeros(len(weights)), weights.new_zeros(len(x))
    for first in range(0, len(x), _CHUNK):
        part = slice(first, first + _CHUNK)
        pairs += (weights[:, part] @ CUBIC.pairs(x[part], x) * weights).sum(1)
        across[part] = CUBIC.pairs(x[part], y).mean(1)
    total, twice = weights.sum(1), weights.square()
    return (pairs - twice @ CUBIC.own(x)) / (total**2 - twice.sum(1)) - 2 * (weights @ across) / total


def gap(value: float, a: Tensor, b: Tensor) -> Estimate:
    """By how much a's metric is above b's, ± 1.96 standard deviations of the differences on the bootstrap samples.

    The images and the noise are shared, so what is hard for both cancels. It says how sure the difference of these two
    *models* is on this data set, not of their recipes.

    Args:
        value: the difference of the metrics.
        a: (draws,), from `redraw`.
        b: (draws,), of the same draws.
    """
    return estimate(value, float((a - b).std()))
