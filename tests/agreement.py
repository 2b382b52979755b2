"""What bench/agree.py gives to the reference programs and the tests give to ours: the same numbers, by numpy alone."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

GOLDEN = Path(__file__).parent / "golden"

SETS = {  # name -> rows of the real set, rows of the made one, how many features, of what rank
    "wide": (400, 300, 64, 64),
    "narrow": (350, 350, 8, 8),
    "flat": (30, 40, 64, 5),
}

PICTURES = {  # name -> height, width, channels
    "small": (32, 32, 3),
    "grey": (28, 28, 1),
    "odd": (47, 71, 3),
    "large": (360, 310, 3),
    "side": (299, 299, 3),
}


def stream(*words: int | str) -> np.random.Generator:
    """A generator of its own for these words."""
    digest = hashlib.sha256(repr(words).encode()).digest()
    return np.random.Generator(np.random.Philox(key=np.frombuffer(digest[:16], np.uint64)))


def features(name: str) -> tuple[np.ndarray, np.ndarray]:
    """Real and made features (m, D), (n, D), float64, ≥ 0 as those of a ReLU."""
    m, n, dim, rank = SETS[name]
    draws = stream("features", name)
    mix = draws.standard_normal((rank, dim)) / np.sqrt(rank)
    real = np.maximum(draws.standard_normal((m, rank)) @ mix + 0.3, 0)
    made = np.maximum(0.9 * draws.standard_normal((n, rank)) @ mix + 0.4, 0)
    return real, made


def logits(rows: int = 230, classes: int = 10) -> np.ndarray:
    """Scores of classes, (rows, classes) float64, some of them sure."""
    draws = stream("logits")
    return 3 * draws.standard_normal((rows, classes)) * draws.random((rows, 1))


def picture(name: str) -> np.ndarray:
    """An 8-bit picture (H, W, C): waves, an edge, and some noise."""
    height, width, channels = PICTURES[name]
    y, x = np.mgrid[:height, :width] / max(height, width)
    draws = stream("picture", name)
    waves = np.stack([np.sin((7 + 5 * c) * x * (c + 1) + 9 * y) + (x + y > 0.8) for c in range(channels)], axis=2)
    noisy = 100 + 60 * waves + 8 * np.round(draws.standard_normal(waves.shape)) * (y[..., None] < 0.03)
    return np.clip(np.round(noisy), 0, 255).astype(np.uint8)


def blurred(pixels: np.ndarray) -> np.ndarray:
    """A reconstruction of 8-bit pixels (H, W, C): each the mean of itself and three neighbours, a little brighter."""
    parts = [np.roll(pixels.astype(np.float64), shift, axis) for shift, axis in ((0, 0), (1, 0), (1, 1), (-1, 0))]
    return np.clip(np.round(sum(parts) / 4 + 3), 0, 255).astype(np.uint8)


def weights(shapes: Mapping[str, Sequence[int]]) -> dict[str, np.ndarray]:
    """Weights of a net by the names and shapes of its state dict, each keyed by its name, scaled to activations."""
    made: dict[str, np.ndarray] = {}
    for name, shape in shapes.items():
        draws = stream("weights", name)
        if name.endswith("running_var"):
            value = 0.5 + draws.random(shape)
        elif name.endswith("num_batches_tracked"):
            value = np.zeros(shape)
        elif len(shape) > 1:
            value = draws.standard_normal(shape) * np.sqrt(2 / np.prod(shape[1:]))
        elif name.endswith("bn.weight"):
            value = 0.8 + 0.4 * draws.random(shape)
        else:
            value = 0.1 * draws.standard_normal(shape)
        made[name] = value.astype(np.int64 if name.endswith("tracked") else np.float32)
    return made
