"""Sliced Wasserstein: how far points must be moved, along random lines; exact in one dimension, for low dimensions."""

from __future__ import annotations

import torch
from torch import Tensor

from inkdrop.core.noise import generator
from inkdrop.errors import BadArgument
from inkdrop.evals.mmd import checked

__all__ = ["sliced_wasserstein", "wasserstein_line"]

_DIRECTIONS = 2**43  # a draw of its own, apart from those of noise


def wasserstein_line(x: Tensor, y: Tensor, *, power: int = 2) -> Tensor:
    """The p-th power of the Wasserstein-p distance of points on the line: ∫₀¹ |F⁻¹(t) − G⁻¹(t)|^p dt, exactly.

    The quantile functions are steps at i/m and j/n; the integral is summed over the pieces between all of them, so that
    sets of different sizes need no thinning.

    Args:
        x: (m, L), L problems at once, m ≥ 1.
        y: (n, L), n ≥ 1.
        power: p ≥ 1.

    Returns:
        (L,), ≥ 0.
    """
    m, n = len(x), len(y)
    ends = torch.cat([torch.arange(1, m + 1) * n, torch.arange(1, n + 1) * m]).unique()  # in units of 1/(mn)
    widths = torch.diff(ends, prepend=ends.new_zeros(1)).to(torch.float64) / (m * n)
    of_x, of_y = (ends - 1) // n, (ends - 1) // m
    gaps = (x.sort(0).values[of_x] - y.sort(0).values[of_y]).abs() ** power
    return (widths[:, None] * gaps).sum(0)


def sliced_wasserstein(x: Tensor, y: Tensor, *, directions: int = 128, power: int = 2, seed: int = 0) -> float:
    """The sliced Wasserstein distance: (mean over unit vectors u of W_p(x·u, y·u)^p)^{1/p}, in units of the points.

    Args:
        x: (m, D), m ≥ 1.
        y: (n, D), n ≥ 1.
        directions: how many vectors u, uniform on the sphere, ≥ 1; in one dimension one is exact.
        power: p ≥ 1.
        seed: of the vectors, in [0, 2^64).

    Raises:
        BadShape: shapes that do not fit together.
        BadArgument: no rows, directions or power below 1, or a number that is not finite.

    Reference:
        Bonneel et al., "Sliced and Radon Wasserstein barycenters of measures", 2015.
    """
    if directions < 1 or power < 1:
        raise BadArgument(f"sliced: got {directions} directions and power {power}, need at least 1 of each")
    x, y = checked(x, y, "sliced", least=1)
    lines = torch.from_numpy(generator(seed, 0, _DIRECTIONS).standard_normal((x.shape[1], directions)))
    lines = lines / lines.norm(dim=0)
    parts = [wasserstein_line(x @ some, y @ some, power=power) for some in lines.split(16, dim=1)]
    return float(torch.cat(parts).mean() ** (1 / power))
