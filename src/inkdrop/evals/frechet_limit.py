"""FID∞: where the Fréchet distance goes as the number of samples grows, by a line in 1/N."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from inkdrop.core.noise import generator
from inkdrop.errors import BadArgument
from inkdrop.evals.frechet import frechet

__all__ = ["Limit", "frechet_limit"]

_SUBSETS = 2**44  # a draw of its own, apart from those of noise


class Limit(NamedTuple):
    """A Fréchet distance without the bias of few samples.

    Attributes:
        limit: at N = ∞; it may come out a little below 0.
        slope: times 1/N is what FID has too much at N samples.
        least: of so many samples is the first point.
    """

    limit: float
    slope: float
    least: int


def frechet_limit(mean: Tensor, cov: Tensor, made: Tensor, *, points: int = 10, seed: int = 0) -> Limit:
    """The limit of FID(N) = limit + slope/N, fitted by least squares to subsets of N/2 to N samples.

    The bias is nearly linear in 1/N once N is several times D, not before. Only that of the samples is taken out; the
    reference's own, of as many as it has, stays.

    Args:
        mean: (D,) of the reference.
        cov: (D, D) of the reference.
        made: (N, D) features of samples, N ≥ 2·D.
        points: subsets, ≥ 3, spaced equally in N.
        seed: of the subsets, in [0, 2^64).

    Raises:
        BadArgument: fewer than 3 points, or fewer samples than 2·D.

    Reference: Chong & Forsyth, "Effectively unbiased FID and Inception Score and where to find them", 2020, section 3.
    """
    n, dim = made.shape
    if points < 3:
        raise BadArgument(f"fid limit points: got {points}, need at least 3")
    if n < 2 * dim:
        raise BadArgument(f"fid limit: got {n} samples of {dim} features, need at least {2 * dim}; try -n {4 * dim}")
    sizes = torch.linspace(n // 2, n, points, dtype=torch.float64).round().long().tolist()
    found = []
    for draw, size in enumerate(sizes):
        rows = torch.from_numpy(generator(seed, draw, _SUBSETS).permutation(n)[:size])
        some = made[rows].to(torch.float64)
        found.append(frechet(mean, cov, some.mean(0), some.T.cov()))
    inverse = 1 / torch.tensor(sizes, dtype=torch.float64)
    design = torch.stack([torch.ones_like(inverse), inverse], dim=1)
    limit, slope = torch.linalg.lstsq(design, torch.tensor(found, dtype=torch.float64)[:, None]).solution[:, 0].tolist()
    return Limit(limit, slope, sizes[0])
