"""MMD: the maximum mean discrepancy of a kernel, squared, with its standard error; in chunks, so in memory O(m + n)."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from inkdrop.errors import BadArgument, BadShape

__all__ = ["CUBIC", "DISTANCE", "Kernel", "Mmd", "checked", "gaussian", "mmd"]

_CHUNK = 1024


class Kernel(NamedTuple):
    """A positive (or conditionally positive) definite kernel k.

    Attributes:
        pairs: (m, D), (n, D) -> k(a_i, b_j), (m, n).
        own: (m, D) -> k(a_i, a_i), (m,).
    """

    pairs: Callable[[Tensor, Tensor], Tensor]
    own: Callable[[Tensor], Tensor]


class Mmd(NamedTuple):
    """A squared maximum mean discrepancy.

    Attributes:
        value: the unbiased estimate; 0 in expectation for equal distributions, and then often negative.
        se: its standard error, ≥ 0.
        biased: the V-statistic, which counts each point's kernel with itself: ≥ 0, and above `value` on average.
    """

    value: float
    se: float
    biased: float


def _cubic(a: Tensor, b: Tensor) -> Tensor:
    base = torch.addmm(a.new_ones(()), a, b.T, alpha=1 / a.shape[1])
    return base * base * base


CUBIC = Kernel(_cubic, lambda a: (a.square().sum(1) / a.shape[1] + 1) ** 3)
"""k(a, b) = (a·b/D + 1)³, of KID (Bińkowski et al. 2018, section 4)."""

DISTANCE = Kernel(
    lambda a, b: -torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist"), lambda a: a.new_zeros(len(a))
)
"""k(a, b) = −|a − b|, of the energy distance (Sejdinovic et al. 2013)."""


def gaussian(sigma: float) -> Kernel:
    """k(a, b) = exp(−|a − b|²/(2·sigma²)).

    Args:
        sigma: the width, > 0, in units of the features.

    Raises:
        BadArgument: a width that is not above 0.
    """
    if not sigma > 0:
        raise BadArgument(f"gaussian kernel sigma: got {sigma:g}, need more than 0; CMMD takes 10")

    def pairs(a: Tensor, b: Tensor) -> Tensor:
        squares = a.square().sum(1)[:, None] + b.square().sum(1) - 2 * a @ b.T
        return torch.exp(-squares.clamp(min=0) / (2 * sigma**2))

    return Kernel(pairs, lambda a: a.new_ones(len(a)))


def mmd(x: Tensor, y: Tensor, kernel: Kernel) -> Mmd:
    """The squared maximum mean discrepancy of two sets of points.

        value = Σ_{i≠j} k(x_i, x_j)/(m(m−1)) + Σ_{i≠j} k(y_i, y_j)/(n(n−1)) − 2 Σ_{ij} k(x_i, y_j)/(mn)

    The standard error is the two-sample jackknife's to first order,

        se² = 4/m · Var_i[mean_{j≠i} k(x_i, x_j) − mean_j k(x_i, y_j)] + 4/n · Var_j[the same of y_j].

    It is right between different distributions; between equal ones, where the estimate is degenerate, se² is twice too
    large.

    Args:
        x: (m, D), m ≥ 2.
        y: (n, D), n ≥ 2.
        kernel: k.

    Raises:
        BadShape: shapes that do not fit together.
        BadArgument: fewer than 2 rows, or a number that is not finite.

    Reference:
        Gretton et al., "A kernel two-sample test", JMLR 13, 2012, eq. 3 (unbiased) and eq. 5 (biased).
    """
    x, y = checked(x, y, "mmd")
    m, n = len(x), len(y)
    within_x, across_x, across_y = (torch.zeros(k, dtype=torch.float64) for k in (m, m, n))
    for first in range(0, m, _CHUNK):
        rows = slice(first, first + _CHUNK)
        within_x[rows] = kernel.pairs(x[rows], x).sum(1)
        across = kernel.pairs(x[rows], y)
        across_x[rows] = across.sum(1)
        across_y += across.sum(0)
    within_y = torch.cat([kernel.pairs(part, y).sum(1) for part in y.split(_CHUNK)])
    biased = within_x.mean() / m + within_y.mean() / n - 2 * across_x.mean() / n
    within_x, within_y = (within_x - kernel.own(x)) / (m - 1), (within_y - kernel.own(y)) / (n - 1)
    across_x, across_y = across_x / n, across_y / m
    value = within_x.mean() + within_y.mean() - 2 * across_x.mean()
    variance = 4 / m * (within_x - across_x).var() + 4 / n * (within_y - across_y).var()
    return Mmd(float(value), float(variance.sqrt()), max(0.0, float(biased)))


def checked(x: Tensor, y: Tensor, what: str, least: int = 2) -> tuple[Tensor, Tensor]:
    """Both sets of features, (m, D) and (n, D), in float64 on the CPU.

    Raises:
        BadShape: shapes that do not fit together.
        BadArgument: fewer than `least` rows, or a feature that is not finite.
    """
    if x.ndim != 2 or y.ndim != 2 or x.shape[1] != y.shape[1] or x.shape[1] == 0:
        raise BadShape(f"{what}: got shapes {tuple(x.shape)} and {tuple(y.shape)}, need (m, D) and (n, D)")
    if min(len(x), len(y)) < least:
        raise BadArgument(f"{what}: got {len(x)} and {len(y)} rows, need at least {least} of each")
    x, y = (t.detach().to("cpu", torch.float64) for t in (x, y))
    if not bool(x.isfinite().all() and y.isfinite().all()):
        raise BadArgument(f"{what}: got a feature that is not finite, need finite features; check the samples")
    return x, y
