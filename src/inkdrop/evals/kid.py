"""Kernel distance (KID): the unbiased squared maximum mean discrepancy of a cubic kernel."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from inkdrop.core.noise import generator
from inkdrop.errors import BadArgument
from inkdrop.evals.mmd import CUBIC, checked, mmd

__all__ = ["Kid", "kid", "subset_mmd"]


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
    x, y = checked(x, y, "kid")
    size = min(size, len(x), len(y))
    values = torch.empty(subsets, dtype=torch.float64)
    for draw in range(subsets):
        draws = generator(seed, 2, draw)
        a = x[torch.from_numpy(draws.permutation(len(x))[:size])]
        b = y[torch.from_numpy(draws.permutation(len(y))[:size])]
        values[draw] = subset_mmd(a, b)
        if size == len(x) == len(y):
            values[draw:] = values[draw]
            break
    std = values.std(correction=0)
    se = (mmd(x, y, CUBIC).se ** 2 + float(std) ** 2 / subsets) ** 0.5
    return Kid(float(values.mean()), float(std), se, subsets, size)


def subset_mmd(x: Tensor, y: Tensor) -> float:
    """The unbiased MMD² of the cubic kernel between two subsets of the same size n ≥ 2, (n, D) float64 each."""
    n = len(x)
    within = (CUBIC.pairs(x, x).sum() - CUBIC.own(x).sum() + CUBIC.pairs(y, y).sum() - CUBIC.own(y).sum()) / (n - 1)
    return float((within - 2 * CUBIC.pairs(x, y).sum() / n) / n)
