"""Intervals: how far a figure would move with other images of the same model, or with other trainings of one recipe."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from inkdrop.core.noise import generator
from inkdrop.errors import BadArgument, BadShape
from inkdrop.evals.frechet import Moments

__all__ = [
    "Estimate",
    "difference_of_means",
    "estimate",
    "frechet_error",
    "mean_of",
    "parts_of",
    "resample",
    "t_quantile",
    "wilson",
]


class Estimate(NamedTuple):
    """A value, its standard error, and an interval that holds the truth in 95 of 100 cases.

    Attributes:
        value: the estimate.
        se: its standard error, ≥ 0.
        low: value − t·se.
        high: value + t·se.
        dof: the degrees of freedom of t; infinite for a normal interval, which is None here so that it is plain JSON.
    """

    value: float
    se: float
    low: float
    high: float
    dof: float | None


def estimate(value: float, se: float, dof: float | None = None) -> Estimate:
    """The 95 % interval value ± t·se, by Student's t of `dof` degrees of freedom, or the normal distribution's."""
    reach = se * (statistics.NormalDist().inv_cdf(0.975) if dof is None else t_quantile(0.975, dof))
    return Estimate(value, se, value - reach, value + reach, dof)


def t_quantile(share: float, dof: float) -> float:
    """The quantile of Student's t distribution, found by bisection on its integral.

        P(T < t) = 1/2 + c ∫_0^θ cos^{ν−1}(u) du,    tan θ = t/√ν,    c = Γ((ν+1)/2) / (√π Γ(ν/2))

    Args:
        share: P(T < t), in (0.5, 1).
        dof: ν, the degrees of freedom, ≥ 1; need not be whole.

    Raises:
        BadArgument: a share or degrees of freedom out of range.
    """
    if not (0.5 < share < 1 and dof >= 1):
        raise BadArgument(f"t quantile: got share {share}, dof {dof}, need a share in (0.5, 1) and dof ≥ 1")
    factor = math.exp(math.lgamma((dof + 1) / 2) - math.lgamma(dof / 2)) / math.sqrt(math.pi)
    nodes, weights = np.polynomial.legendre.leggauss(200)

    def above(theta: float) -> bool:
        angles = theta / 2 * (nodes + 1)
        return 0.5 + factor * theta / 2 * float((weights * np.cos(angles) ** (dof - 1)).sum()) > share

    low, high = 0.0, math.pi / 2
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (low, middle) if above(middle) else (middle, high)
    return math.sqrt(dof) * math.tan(low)


def mean_of(values: Sequence[float]) -> Estimate:
    """The mean over independent trainings and its t-interval, with n − 1 degrees of freedom.

    Raises:
        BadArgument: fewer than 2 values.
    """
    if len(values) < 2:
        raise BadArgument(f"interval over seeds: got {len(values)} runs, need at least 2 that differ only by seed")
    return estimate(statistics.mean(values), statistics.stdev(values) / math.sqrt(len(values)), len(values) - 1)


def difference_of_means(a: Sequence[float], b: Sequence[float]) -> Estimate:
    """mean(a) − mean(b) over independent trainings, with Welch's t-interval: neither need vary as much as the other.

        se² = s_a²/m + s_b²/n,    ν = se⁴ / ((s_a²/m)²/(m−1) + (s_b²/n)²/(n−1))

    Raises:
        BadArgument: fewer than 2 values of one.

    Reference:
        Welch, "The generalization of Student's problem when several different population variances are involved",
        Biometrika 34, 1947.
    """
    if min(len(a), len(b)) < 2:
        raise BadArgument(f"difference over seeds: got {len(a)} and {len(b)} runs, need at least 2 of each")
    parts = [statistics.variance(values) / len(values) for values in (a, b)]
    total = sum(parts)
    spread = sum(part**2 / (len(values) - 1) for part, values in zip(parts, (a, b), strict=True))
    dof = total**2 / spread if spread > 0 else float(len(a) + len(b) - 2)
    return estimate(statistics.mean(a) - statistics.mean(b), math.sqrt(total), dof)


def parts_of(count: int, parts: int, seed: int, first: int = 0) -> Tensor:
    """In which of the parts each image is: int64 (count,), all as large as they can be, the same at any batch size.

    Each run of `parts` images in a row is dealt out by a permutation of its own, so that classes that are asked for in
    turn do not fall into one part.

    Args:
        count: how many images.
        parts: how many parts, ≥ 1.
        seed: of the permutations, in [0, 2^64).
        first: number of the first image.
    """
    runs = range(first // parts, -(-(first + count) // parts))
    dealt = np.concatenate([generator(seed, 3, run).permutation(parts) for run in runs] or [np.empty(0, np.int64)])
    start = first - runs.start * parts
    return torch.from_numpy(dealt[start : start + count].astype(np.int64))


def frechet_error(parts: Sequence[Moments], mean: Tensor, cov: Tensor) -> float:
    """The standard error of the Fréchet distance to a fixed Gaussian, by the jackknife over parts of the images.

        se² = (G − 1)/G Σ_g (d²_(g) − mean d²_(·))²,    d²_(g) without the images of part g

    It says how far the distance moves with other images of the same model; the reference, and the upward bias of a
    finite number of images, stay as they are.

    Args:
        parts: moments of G ≥ 2 parts of the images, about equally large.
        mean: (D,), of the reference.
        cov: (D, D), of the reference.

    Raises:
        BadArgument: fewer than 2 parts, or too few images for a covariance without one of them.

    Reference:
        Efron & Tibshirani, "An introduction to the bootstrap", 1993, chapter 11; by parts, section 11.5.
    """
    if len(parts) < 2:
        raise BadArgument(f"jackknife: got {len(parts)} parts, need at least 2")
    values, vectors = torch.linalg.eigh((cov + cov.T) / 2)
    root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    found = []
    for left_out in range(len(parts)):
        rest = Moments(len(mean))
        for index, part in enumerate(parts):
            if index != left_out:
                rest.merge(part)
        overlap = torch.linalg.eigvalsh(root @ rest.cov @ root).clamp(min=0).sqrt().sum()
        found.append(float((rest.mean - mean).square().sum() + rest.cov.trace() + cov.trace() - 2 * overlap))
    return math.sqrt((len(found) - 1) * statistics.pvariance(found))


def resample(count: int, draws: int, seed: int) -> Tensor:
    """How often each image is in each bootstrap sample: float64 (draws, count), each row sums to count.

    Args:
        count: how many images, ≥ 1.
        draws: how many samples, ≥ 1.
        seed: of the draws, in [0, 2^64).

    Raises:
        BadShape: no image, or no draw.
    """
    if count < 1 or draws < 1:
        raise BadShape(f"bootstrap: got {draws} draws of {count} images, need at least 1 of each")
    found = generator(seed, 4, 0).multinomial(count, np.full(count, 1 / count), size=draws)
    return torch.from_numpy(found.astype(np.float64))


def wilson(right: int, n: int, z: float = 1.96) -> tuple[float, float]:
    """The interval of a share p = right/n: (p + z²/2n ± z·√(p(1 − p)/n + z²/4n²))/(1 + z²/n).

    Args:
        right: 0 to n.
        n: at least 1.
        z: standard errors to either side; 1.96 for 95 %.

    Raises:
        BadArgument: counts outside their range.

    Reference: Wilson 1927.
    """
    if not 0 <= right <= n or n < 1:
        raise BadArgument(f"wilson: got {right} of {n}, need 0 to n of at least 1")
    p, grow = right / n, 1 + z**2 / n
    middle, wide = p + z**2 / (2 * n), z * math.sqrt(p * (1 - p) / n + z**2 / (4 * n**2))
    return (middle - wide) / grow, (middle + wide) / grow
