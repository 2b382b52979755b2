"""Which samples an update sees, and at which learning rate: pure functions of the update's number."""

from __future__ import annotations

import math

import numpy as np

from inkdrop.core.noise import generator
from inkdrop.settings import Train

__all__ = ["learning_rate", "rows_of"]

_EPOCHS = 2**62  # the image word of the order's keys, far from any sample's


def rows_of(update: int, batch: int, total: int, seed: int) -> list[int]:
    """The indices of the samples of one update: epochs of keyed permutations, one after the other.

    Args:
        update: counted from 0.
        batch: samples an update.
        total: samples in the data set.
        seed: of the run.
    """
    rows: list[int] = []
    first = update * batch
    while len(rows) < batch:
        epoch, at = divmod(first + len(rows), total)
        order = _permutation(seed, epoch, total)
        rows += order[at : at + batch - len(rows)].tolist()
    return rows


_last: dict[tuple[int, int, int], np.ndarray] = {}


def _permutation(seed: int, epoch: int, total: int) -> np.ndarray:
    """The order of one epoch; the newest two are remembered, as drawing one anew for each update would cost a pass."""
    key = (seed, epoch, total)
    order = _last.get(key)
    if order is None:
        order = generator(seed, _EPOCHS, epoch).permutation(total)
        for old in list(_last)[:-1]:  # two, for threads that are on either side of an epoch's end
            _last.pop(old, None)
        _last[key] = order
    return order


def learning_rate(update: int, train: Train) -> float:
    """The rate of one update, counted from 0: linear warm-up, then cosine to lr·final, or constant."""
    if update < train.warmup:
        return train.lr * (update + 1) / train.warmup
    if train.decay == "constant":
        return train.lr
    part = min(1.0, (update - train.warmup) / max(1, train.steps - train.warmup))
    return train.lr * (train.final + (1 - train.final) * 0.5 * (1 + math.cos(math.pi * part)))
