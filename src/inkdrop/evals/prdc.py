"""Precision, recall, density and coverage: fidelity and diversity apart, by balls round each point's neighbours."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from inkdrop.errors import BadArgument
from inkdrop.evals.mmd import checked

__all__ = ["Prdc", "prdc"]

_CHUNK = 1024


class Prdc(NamedTuple):
    """How much of one set lies within another, and the other way round.

    Attributes:
        precision: share of samples within a ball of the real points, in [0, 1]: fidelity.
        recall: share of real points within a ball of the samples, in [0, 1]: diversity.
        density: in how many real balls a sample lies, over k; about 1 for equal distributions, it may be above.
        coverage: share of real balls with a sample in them, in [0, 1].
        k: which neighbour gives a ball its radius.
    """

    precision: float
    recall: float
    density: float
    coverage: float
    k: int


def prdc(real: Tensor, made: Tensor, *, k: int = 5) -> Prdc:
    """Precision and recall (Kynkäänniemi et al.), density and coverage (Naeem et al.) of samples against real points.

    Each point has a ball, whose radius is the distance to its k-th nearest neighbour in its own set; a point lies in a
    ball where it is nearer than the radius. All four depend on the numbers of points: compare at equal m and n, and
    beside the figures of real points. One outlier among the real points has a ball that covers much: precision and
    recall suffer from that, density and coverage less.

    Args:
        real: (m, D) features, m > k.
        made: (n, D) features, n > k.
        k: ≥ 1; 5 is Naeem et al.'s, 3 Kynkäänniemi et al.'s.

    Raises:
        BadShape: shapes that do not fit together.
        BadArgument: no more rows than k, k below 1, or a feature that is not finite.

    Cost: 3 tables of distances, m², n² and m·n, in float64, in chunks of 1,024 rows.

    Reference:
        Kynkäänniemi et al., "Improved precision and recall metric for assessing generative models", 2019, eq. 1 to 3;
        Naeem et al., "Reliable fidelity and diversity metrics for generative models", 2020, eq. 1 to 4.
    """
    if k < 1:
        raise BadArgument(f"prdc k: got {k}, need at least 1")
    real, made = checked(real, made, f"prdc with k={k}", least=k + 1)
    real, made = real - real.mean(0), made - real.mean(0)
    real_radius, made_radius = _radii(real, k), _radii(made, k)
    inside, recalled, covered = torch.zeros(len(made), dtype=torch.int64), 0, 0
    for first in range(0, len(real), _CHUNK):
        rows = slice(first, first + _CHUNK)
        apart = torch.cdist(real[rows], made)
        inside += (apart < real_radius[rows, None]).sum(0)
        recalled += int((apart < made_radius).any(1).sum())
        covered += int((apart.amin(1) < real_radius[rows]).sum())
    return Prdc(
        precision=float((inside > 0).double().mean()),
        recall=recalled / len(real),
        density=float(inside.double().mean()) / k,
        coverage=covered / len(real),
        k=k,
    )


def _radii(x: Tensor, k: int) -> Tensor:
    """The distance of each point to its k-th nearest other one, (n,)."""
    return torch.cat([torch.cdist(part, x).kthvalue(k + 1).values for part in x.split(_CHUNK)])
