"""Kernel distance (KID): the unbiased squared maximum mean discrepancy of a cubic kernel."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from inkdrop.core.noise import generator
from inkdrop.errors import BadArgument, BadShape

__all__ = ["Kid", "kid", "mmd2"]

_CHUNK = 1024


class Kid(NamedTuple):
    """A kernel distance and how sure it is.

    Attributes:
        mean: of the subsets' unbiased MMD²; 0 in expectation for equal distributions, and then often negative.
        std: over the subsets (with 1/subsets, as torch-fidelity prints); it shrinks with `size`, not with N.
        se: standard error of the mean: how far it would move with other samples of both sets, and other subsets.
        subsets: how many subsets.
        size: rows of each set in a subset.
    """

    mean: float
    std: float
    se: float
    subsets: int
    size: int


def mmd2(x: Tensor, y: Tensor) -> tuple[float, float]:
    """The unbiased squared maximum mean discrepancy of k(a, b) = (a·b/D + 1)³ and its standard error.

        MMD² = Σ_{i≠j} k(x_i, x_j)/(m(m−1)) + Σ_{i≠j} k(y_i, y_j)/(n(n−1)) − 2 Σ_{ij} k(x_i, y_j)/(mn)

    The standard error is the two-sample jackknife's to first order,

        se² = 4/m · Var_i[mean_{j≠i} k(x_i, x_j) − mean_j k(x_i, y_j)] + 4/n · Var_j[the same of y_j].

    It is right between different distributions; between equal ones, where MMD² is degenerate, se² is twice too large.

    Args:
        x: (m, D) features, m ≥ 2.
        y: (n, D) features, n ≥ 2.

    Returns:
        MMD² (may be negative: it is unbiased), and its standard error ≥ 0. Memory is O(m + n), kernels come in chunks.

    Raises:
        BadShape: shapes that do not fit together.
        BadArgument: fewer than 2 rows, or a feature that is not finite.

    Reference:
        Gretton et al., "A kernel two-sample test", JMLR 13, 2012, eq. 3; the kernel is that of Bińkowski et al.,
        "Demystifying MMD GANs", 2018, section 4.
    """
    x, y = _checked(x, y)
    m, n = len(x), len(y)
    within_x, across_x, within_y, across_y = (torch.zeros(k, dtype=torch.float64) for k in (m, m, n, n))
    for first in range(0, m, _CHUNK):
        rows = slice(first, first + _CHUNK)
        within_x[rows] = _kernel(x[rows], x).sum(1)
        across = _kernel(x[rows], y)
        across_x[rows] = across.sum(1)
        across_y += across.sum(0)
    for first in range(0, n, _CHUNK):
        rows = slice(first, first + _CHUNK)
        within_y[rows] = _kernel(y[rows], y).sum(1)
    within_x, within_y = (within_x - _diagonal(x)) / (m - 1), (within_y - _diagonal(y)) / (n - 1)
    across_x, across_y = across_x / n, across_y / m
    value = within_x.mean() + within_y.mean() - 2 * across_x.mean()
    variance = 4 / m * (within_x - across_x).var() + 4 / n * (within_y - across_y).var()
    return float(value), float(variance.sqrt())


def kid(x: Tensor, y: Tensor, *, subsets: int = 100, size: int = 1000, seed: int = 0) -> Kid:
    """The kernel distance between two sets of features: the mean of MMD² over random subsets.

    A subset takes `size` rows of each set without replacement, or as many as the smaller set has. With size = N every
    subset is the whole, std is 0 and only `se` says how sure the value is.

    Args:
        x: (m, D) features, m ≥ 2.
        y: (n, D) features, n ≥ 2.
        subsets: how many, ≥ 1.
        size: rows of each set in a subset, ≥ 2.
        seed: key of the subsets, in [0, 2^64).

    Raises:
        BadShape: shapes that do not fit together.
        BadArgument: subsets below 1, size below 2, fewer than 2 rows, or a feature that is not finite.

    Reference:
        Bińkowski et al., "Demystifying MMD GANs", 2018, section 4; defaults as torch-fidelity's.
    """
    if subsets < 1 or size < 2:
        raise BadArgument(f"kid: got subsets={subsets}, size={size}, need at least 1 and 2")
    x, y = _checked(x, y)
    size = min(size, len(x), len(y))
    values = torch.empty(subsets, dtype=torch.float64)
    for draw in range(subsets):
        draws = generator(seed, 2, draw)
        a = x[torch.from_numpy(draws.permutation(len(x))[:size])]
        b = y[torch.from_numpy(draws.permutation(len(y))[:size])]
        within = (_kernel(a, a).sum() - _diagonal(a).sum() + _kernel(b, b).sum() - _diagonal(b).sum()) / (size - 1)
        values[draw] = (within - 2 * _kernel(a, b).sum() / size) / size
        if size == len(x) == len(y):
            values[draw:] = values[draw]
            break
    std = values.std(correction=0)
    se = (mmd2(x, y)[1] ** 2 + float(std) ** 2 / subsets) ** 0.5
    return Kid(float(values.mean()), float(std), se, subsets, size)


def _kernel(a: Tensor, b: Tensor) -> Tensor:
    """(a·b/D + 1)³: (m, n) of (m, D) and (n, D)."""
    base = torch.addmm(a.new_ones(()), a, b.T, alpha=1 / a.shape[1])
    return base * base * base


def _diagonal(a: Tensor) -> Tensor:
    """k(a_i, a_i): (m,)."""
    return (a.square().sum(1) / a.shape[1] + 1) ** 3


def _checked(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Both sets in float64 on the CPU."""
    if x.ndim != 2 or y.ndim != 2 or x.shape[1] != y.shape[1] or x.shape[1] == 0:
        raise BadShape(f"kid: got shapes {tuple(x.shape)} and {tuple(y.shape)}, need (m, D) and (n, D)")
    if min(len(x), len(y)) < 2:
        raise BadArgument(f"kid: got {len(x)} and {len(y)} rows, need at least 2 of each")
    x, y = (t.detach().to("cpu", torch.float64) for t in (x, y))
    if not bool(x.isfinite().all() and y.isfinite().all()):
        raise BadArgument("kid: got a feature that is not finite, need finite features; check the samples")
    return x, y
