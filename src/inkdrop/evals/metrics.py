"""Metrics: what `inkdrop eval --metric NAME` measures besides; a function each, of two pools of features.

FID, KID, classes and copies are always measured. Each of these gives plain JSON, and is also taken of real training
images in place of the samples.
"""

from __future__ import annotations

from typing import Any

from inkdrop.errors import BadArgument
from inkdrop.evals.frechet_limit import frechet_limit
from inkdrop.evals.mmd import DISTANCE, gaussian, mmd
from inkdrop.evals.pool import Pool
from inkdrop.evals.prdc import prdc as balls
from inkdrop.evals.sliced import sliced_wasserstein

__all__ = ["cmmd", "energy", "fid_limit", "inception_score", "prdc", "sliced"]


def prdc(real: Pool, made: Pool, *, k: int = 5) -> dict[str, Any]:
    """Precision, recall, density and coverage: fidelity and diversity apart.

    Args:
        real: of held-out images.
        made: of samples.
        k: whose distance is the radius of a ball, ≥ 1.
    """
    return balls(real.kept.rows, made.kept.rows, k=k)._asdict()


def cmmd(real: Pool, made: Pool, *, sigma: float = 10.0) -> dict[str, Any]:
    """1,000 times the squared MMD of a Gaussian kernel; with CLIP's features it is CMMD (Jayasumana et al. 2024).

    Args:
        real: of held-out images.
        made: of samples.
        sigma: width of the kernel, > 0, in units of the features.
    """
    found = mmd(real.kept.rows, made.kept.rows, gaussian(sigma))
    return {"value": 1000 * found.biased, "unbiased": 1000 * found.value, "se": 1000 * found.se}


def energy(real: Pool, made: Pool) -> dict[str, Any]:
    """The energy distance, 2·E|x − y| − E|x − x'| − E|y − y'|, unbiased: for low dimensions (Székely & Rizzo 2013).

    Args:
        real: of held-out images.
        made: of samples.
    """
    found = mmd(real.kept.rows, made.kept.rows, DISTANCE)
    return {"value": found.value, "se": found.se}


def sliced(real: Pool, made: Pool, *, directions: int = 128, power: int = 2, seed: int = 0) -> dict[str, Any]:
    """The sliced Wasserstein distance, for low dimensions.

    Args:
        real: of held-out images.
        made: of samples.
        directions: random lines, ≥ 1.
        power: p of Wasserstein-p, ≥ 1.
        seed: of the lines.
    """
    rows = real.kept.rows, made.kept.rows
    return {"value": sliced_wasserstein(*rows, directions=directions, power=power, seed=seed)}


def inception_score(real: Pool, made: Pool) -> dict[str, Any]:
    """Sure of each image and of all classes alike; it does not look at the data (Salimans et al. 2016).

    Args:
        real: not looked at.
        made: of samples.
    """
    if made.surety is None:
        raise BadArgument(f"inception_score: {made.features.name} features have no classes to be sure of")
    return made.surety.report()._asdict()


def fid_limit(real: Pool, made: Pool, *, points: int = 10, seed: int = 0) -> dict[str, Any]:
    """FID∞, extrapolated to infinitely many samples from subsets of at most 10,000 (Chong & Forsyth 2020).

    Args:
        real: of held-out images.
        made: of samples.
        points: subsets that the line goes through, ≥ 3.
        seed: of the subsets.
    """
    return frechet_limit(real.moments.mean, real.moments.cov, made.kept.rows, points=points, seed=seed)._asdict()
