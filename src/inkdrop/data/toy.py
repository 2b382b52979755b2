"""Toys: data sets drawn by formula, whose moments are known: one- and two-dimensional points, and drawn circles.

Train and test are different draws of one keyed generator; the same (split, knobs) is the same data everywhere.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence

import numpy as np
import torch

from inkdrop.core.dataset import Data
from inkdrop.core.noise import generator
from inkdrop.data.arrays import SPLITS, Arrays, check_split
from inkdrop.errors import BadArgument

__all__ = ["checkerboard", "circles", "mixture1d", "moons", "spirals"]

_SPREAD = 0.8  # the half-width of moons and spirals before noise, leaving room for it inside [-1, 1]


def mixture1d(
    split: str,
    *,
    means: tuple[float, ...] = (-0.6, 0.0, 0.5),
    stds: tuple[float, ...] = (0.08, 0.05, 0.12),
    weights: tuple[float, ...] = (0.3, 0.3, 0.4),
    labelled: bool = False,
    count: int = 10_000,
    seed: int = 0,
) -> Data:
    """A mixture of Gaussians on the line: x ~ Σ_k weights[k]·N(means[k], stds[k]²), shape (1,).

    Draws outside [-1, 1] are rejected and drawn again, so the density is the mixture's over its mass in [-1, 1]. At
    the default knobs that mass is 1 − 6·10⁻⁶.

    Args:
        split: "train" or "test".
        means: of the components, each in [-1, 1].
        stds: their standard deviations, > 0, one a mean.
        weights: their shares, ≥ 0 with a positive sum (by which they are divided), one a mean.
        labelled: whether the component is the label.
        count: samples in each split, ≥ 1.
        seed: of the generator, in [0, 2^63).

    Raises:
        BadArgument: a knob outside its range, or more than 1 % of the mass outside [-1, 1].
    """
    draws = _draws("mixture1d", split, count, seed)
    share = _mixture(means, stds, weights)
    centre, width = np.array(means), np.array(stds)

    def points(size: int) -> tuple[np.ndarray, np.ndarray]:
        kind = draws.choice(len(share), size, p=share)
        return (centre[kind] + width[kind] * draws.standard_normal(size))[:, None], kind

    about = f"means {means} stds {stds} weights {weights}"
    names = [f"component {k}" for k in range(len(share))] if labelled else []
    return _points("mixture1d", split, points, count, names, about)


def moons(split: str, *, std: float = 0.04, labelled: bool = False, count: int = 10_000, seed: int = 0) -> Data:
    """Two interleaved half circles in the plane, shape (2,).

    With t uniform on [0, π], u = (cos t, sin t) on the upper and (1 − cos t, 1/2 − sin t) on the lower moon, each with
    probability 1/2, x = 0.8·(u − (1/2, 1/4))/1.5 + std·N(0, I). Draws outside [-1, 1]² are drawn again.

    Args:
        split: "train" or "test".
        std: the standard deviation of the noise, in [0, 0.2].
        labelled: whether the moon is the label.
        count: samples in each split, ≥ 1.
        seed: of the generator, in [0, 2^63).
    """
    draws = _draws("moons", split, count, seed)
    _need("moons std", std, 0, 0.2)

    def points(size: int) -> tuple[np.ndarray, np.ndarray]:
        t, kind = draws.uniform(0, math.pi, size), draws.integers(0, 2, size)
        across = np.where(kind == 0, np.cos(t), 1 - np.cos(t))
        up = np.where(kind == 0, np.sin(t), 0.5 - np.sin(t))
        u = np.stack([across - 0.5, up - 0.25], axis=1)
        return _SPREAD * u / 1.5 + std * draws.standard_normal((size, 2)), kind

    return _points("moons", split, points, count, ["upper", "lower"] if labelled else [], f"std {std}")


def spirals(
    split: str,
    *,
    turns: float = 1.5,
    std: float = 0.02,
    labelled: bool = False,
    count: int = 10_000,
    seed: int = 0,
) -> Data:
    """Two spiral arms in the plane, shape (2,).

    With u uniform on [0, 1] and r = 0.8·√u, x = ±r·(cos a, sin a) + std·N(0, I) at the angle a = 2π·turns·√u, each
    sign with probability 1/2. Draws outside [-1, 1]² are drawn again.

    Args:
        split: "train" or "test".
        turns: how often an arm winds round the centre, in [0.25, 4].
        std: the standard deviation of the noise, in [0, 0.2].
        labelled: whether the arm is the label.
        count: samples in each split, ≥ 1.
        seed: of the generator, in [0, 2^63).
    """
    draws = _draws("spirals", split, count, seed)
    _need("spirals turns", turns, 0.25, 4)
    _need("spirals std", std, 0, 0.2)

    def points(size: int) -> tuple[np.ndarray, np.ndarray]:
        root, kind = np.sqrt(draws.uniform(0, 1, size)), draws.integers(0, 2, size)
        angle = 2 * math.pi * turns * root
        r = _SPREAD * root * np.where(kind == 0, 1, -1)
        arm = np.stack([r * np.cos(angle), r * np.sin(angle)], axis=1)
        return arm + std * draws.standard_normal((size, 2)), kind

    names = ["first", "second"] if labelled else []
    return _points("spirals", split, points, count, names, f"turns {turns} std {std}")


def checkerboard(split: str, *, cells: int = 4, count: int = 10_000, seed: int = 0) -> Data:
    """The dark cells of a checkerboard on [-1, 1]², uniformly, shape (2,).

    Cell (i, j) of the cells × cells board is dark where i + j is even.

    Args:
        split: "train" or "test".
        cells: cells a side, 2 to 16.
        count: samples in each split, ≥ 1.
        seed: of the generator, in [0, 2^63).
    """
    draws = _draws("checkerboard", split, count, seed)
    _need("checkerboard cells", cells, 2, 16)
    dark = np.array([(i, j) for i in range(cells) for j in range(cells) if (i + j) % 2 == 0])

    def points(size: int) -> tuple[np.ndarray, np.ndarray]:
        corner = dark[draws.integers(0, len(dark), size)]
        return 2 * (corner + draws.uniform(0, 1, (size, 2))) / cells - 1, np.zeros(size, dtype=np.int64)

    return _points("checkerboard", split, points, count, [], f"cells {cells}")


def circles(split: str, *, size: int = 32, count: int = 2_048, seed: int = 0) -> Data:
    """Drawn circles: one filled, anti-aliased disc an image on black, shape (1, size, size).

    Radius r ~ U[size/8, size/3], centre uniform where the whole disc is inside the image, brightness
    b ~ U[0.5, 1]. A pixel at the distance d from the centre is covered by clip(r − d + 1/2, 0, 1) and has the 8-bit
    value round(255·b·cover), so levels = 256.

    Args:
        split: "train" or "test".
        size: height and width, 16 to 64 pixels.
        count: images in each split, ≥ 1.
        seed: of the generator, in [0, 2^63).
    """
    draws = _draws("circles", split, count, seed)
    _need("circles size", size, 16, 64)
    r = draws.uniform(size / 8, size / 3, (count, 1, 1))
    x, y = (r + draws.uniform(0, 1, (count, 1, 1)) * (size - 2 * r) for _ in range(2))
    bright = draws.uniform(0.5, 1, (count, 1, 1))
    middle = np.arange(size) + 0.5
    d = np.hypot(middle[None, None, :] - x, middle[None, :, None] - y)
    pixels = np.rint(255 * bright * np.clip(r - d + 0.5, 0, 1)).astype(np.uint8)
    about = f"circles drawn by formula, {size} × {size}, seed {seed}; no licence needed"
    return Arrays(torch.from_numpy(pixels[:, None]), title=f"circles {split}", source=about)


def _draws(name: str, split: str, count: int, seed: int) -> np.random.Generator:
    """The generator of (data set, split, seed); it shares no key with sampling, whose draws are small numbers."""
    check_split(split)
    _need(f"{name} count", count, 1, 10_000_000)
    _need(f"{name} seed", seed, 0, 2**63 - 1)
    stream = int.from_bytes(hashlib.sha256(f"inkdrop data {name}".encode()).digest()[:8], "big")
    return generator(seed, SPLITS.index(split), stream)


def _need(what: str, got: float, low: float, high: float) -> None:
    if not low <= got <= high:
        raise BadArgument(f"{what}: got {got}, need {low} to {high}")


def _mixture(means: Sequence[float], stds: Sequence[float], weights: Sequence[float]) -> np.ndarray:
    """The checked weights as shares that add up to 1, float64 (K,)."""
    if not len(means) == len(stds) == len(weights) >= 1:
        got = f"{len(means)} means, {len(stds)} stds and {len(weights)} weights"
        raise BadArgument(f"mixture1d: got {got}, need one of each for every component")
    for k, (mean, std, weight) in enumerate(zip(means, stds, weights, strict=True)):
        _need(f"mixture1d means[{k}]", mean, -1, 1)
        _need(f"mixture1d stds[{k}]", std, 1e-6, 1)
        _need(f"mixture1d weights[{k}]", weight, 0, 1e6)
    if sum(weights) <= 0:
        raise BadArgument("mixture1d weights: got only zeros, need one above 0")
    share = np.array(weights, dtype=np.float64) / sum(weights)
    tails = [math.erfc((1 + s * m) / (d * math.sqrt(2))) / 2 for m, d in zip(means, stds, strict=True) for s in (1, -1)]
    outside = float(share.repeat(2) @ np.array(tails))
    if outside > 0.01:
        raise BadArgument(
            f"mixture1d: {outside:.1%} of the mixture is outside [-1, 1], need at most 1%; try smaller stds"
        )
    return share


def _points(
    name: str,
    split: str,
    points: Callable[[int], tuple[np.ndarray, np.ndarray]],
    count: int,
    classes: Sequence[str],
    about: str,
) -> Data:
    """Draws of `points` inside [-1, 1]^D until there are `count`; rejected ones are drawn again with their label."""
    kept: list[tuple[np.ndarray, np.ndarray]] = []
    left = count
    while left:
        x, kind = points(left)
        inside = (np.abs(x) <= 1).all(axis=1)
        kept.append((x[inside], kind[inside]))
        left -= int(inside.sum())
    x = np.concatenate([part for part, _ in kept]).astype(np.float32)
    labels = torch.from_numpy(np.concatenate([part for _, part in kept]).astype(np.int64)) if classes else None
    source = f"{name} drawn by formula, {about}; no licence needed"
    return Arrays(torch.from_numpy(x), labels, title=f"{name} {split}", source=source, classes=classes)
