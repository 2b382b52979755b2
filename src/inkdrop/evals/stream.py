"""Streams: data sets in chunks and subsets of them, so that memory does not grow with the number of samples."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor

from inkdrop.core.dataset import Data
from inkdrop.core.noise import generator
from inkdrop.errors import BadArgument, BadShape

__all__ = ["Progress", "Reservoir", "chunk_rows", "chunks", "cut", "subset"]

Progress: TypeAlias = Callable[[int, int, str], None]
"""f(done, total, text): how far a task is; total may grow where the number of samples is not known beforehand."""

_CHUNK_BYTES = 64 << 20


def chunk_rows(shape: Sequence[int], most: int = 2048) -> int:
    """How many float32 samples of shape (C, *S) fit into 64 MiB: at least 1, at most `most`."""
    return max(1, min(most, _CHUNK_BYTES // (4 * max(1, int(np.prod(shape))))))


def chunks(
    data: Data, *, rows: Sequence[int] | None = None, size: int | None = None
) -> Iterator[tuple[int, Tensor, Tensor | None]]:
    """A data set in chunks: (place of the first row, x, labels).

    Args:
        data: of N samples of shape (C, *S).
        rows: which of them, in this order; all by default.
        size: samples a chunk, ≥ 1; as many as fit into 64 MiB by default.

    Yields:
        The place in `rows` of the chunk's first sample; x float32 (B, C, *S); labels int64 (B,), or None.
    """
    order: Sequence[int] = range(len(data)) if rows is None else rows
    step = chunk_rows(data.shape) if size is None else size
    for index, part in enumerate(cut(order, step)):
        x, cond = data.take(part)
        yield index * step, x, None if cond is None else cond.label


def cut(rows: Sequence[int], size: int) -> list[Sequence[int]]:
    """Rows in parts of `size`, the last of which may be smaller."""
    return [rows[first : first + size] for first in range(0, len(rows), size)]


def subset(count: int, most: int, *, seed: int, draw: int = 0) -> list[int]:
    """Row numbers of a random subset without replacement, ascending; all of them where most ≥ count.

    Args:
        count: how many rows there are.
        most: how many are wanted.
        seed: key of the draw, in [0, 2^64).
        draw: another number gives an independent subset, in [0, 2^64).
    """
    if most >= count:
        return list(range(count))
    picked: list[int] = generator(seed, 0, draw).permutation(count)[:most].tolist()
    return sorted(picked)


class Reservoir:
    """A uniform random subset, without replacement, of rows that come in a stream of unknown length.

    Args:
        size: how many rows are kept, ≥ 1; all of them until there are more.
        seed: key of the choice, in [0, 2^64).

    Raises:
        BadArgument: a size below 1.

    Reference:
        Vitter, "Random sampling with a reservoir", ACM TOMS 11(1), 1985, Algorithm R.
    """

    def __init__(self, size: int, *, seed: int = 0) -> None:
        if size < 1:
            raise BadArgument(f"reservoir size: got {size}, need at least 1")
        self.size, self.seen = size, 0
        self._draws = generator(seed, 1, 0)
        self._kept: list[Tensor] = []

    def update(self, x: Tensor) -> None:
        """Take in rows (B, D)."""
        if x.ndim != 2:
            raise BadShape(f"reservoir: got shape {tuple(x.shape)}, need (B, D)")
        places = np.arange(self.seen, self.seen + len(x))
        slots = np.where(places < self.size, places, self._draws.integers(0, places + 1))
        for row in np.flatnonzero(slots < self.size):
            if len(self._kept) <= slots[row]:
                self._kept.append(x[row].clone())
            else:
                self._kept[slots[row]] = x[row].clone()
        self.seen += len(x)

    @property
    def rows(self) -> Tensor:
        """The rows kept: (min(size, seen), D), in no particular order; (0, 0) before the first."""
        return torch.stack(self._kept) if self._kept else torch.empty(0, 0)
