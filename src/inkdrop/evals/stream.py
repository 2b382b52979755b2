"""Streams: data sets in chunks and subsets of them, so that memory does not grow with the number of samples."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterator, Mapping, Sequence
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
_RANKS = 2**42  # a draw of its own, apart from those of noise


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

    Each place of the stream has a uniform random rank, keyed by (seed, place), and the rows of the `size` smallest
    ranks are kept. So what is kept depends neither on how the stream is cut into batches nor on who read which part of
    it: two reservoirs of one seed that saw different places merge into the one that had seen both.

    Args:
        size: how many rows are kept, ≥ 1; all of them until there are more.
        seed: key of the choice, in [0, 2^64).

    Attributes:
        seen: how many rows came.

    Raises:
        BadArgument: a size below 1.

    Reference:
        Efraimidis & Spirakis, "Weighted random sampling with a reservoir", IPL 97(5), 2006, with equal weights.
    """

    def __init__(self, size: int, *, seed: int = 0) -> None:
        if size < 1:
            raise BadArgument(f"reservoir size: got {size}, need at least 1")
        self.size, self.seed, self.seen = size, seed, 0
        self._kept: list[tuple[float, int, Tensor]] = []  # a heap of (−rank, place, row): the greatest rank comes first

    def update(self, x: Tensor, *, first: int | None = None) -> None:
        """Take in rows (B, D).

        Args:
            x: the rows.
            first: the place of the first one in the whole stream, where others read other parts of it; by default the
                rows follow those that came before.

        Raises:
            BadShape: no rows of a matrix, or of another length than before.
        """
        if x.ndim != 2 or (self._kept and x.shape[1] != len(self._kept[0][2])):
            need = len(self._kept[0][2]) if self._kept else "D"
            raise BadShape(f"reservoir: got shape {tuple(x.shape)}, need (B, {need})")
        start = self.seen if first is None else first
        ranks = _ranks(self.seed, start, len(x))
        bound = 1.0 if len(self._kept) < self.size else -self._kept[0][0]
        for row in np.flatnonzero(ranks < bound):
            self._offer((-float(ranks[row]), start + int(row), x[row].detach().cpu().clone()))
        self.seen += len(x)

    def merge(self, other: Reservoir) -> None:
        """Take in what another one of the same size and seed has kept of other places.

        Raises:
            BadArgument: another size or seed, or a place that both have seen.
        """
        if (other.size, other.seed) != (self.size, self.seed):
            theirs, ours = f"size {other.size}, seed {other.seed}", f"size {self.size}, seed {self.seed}"
            raise BadArgument(f"reservoir merge: got {theirs}, need {ours}")
        if {place for _, place, _ in self._kept} & {place for _, place, _ in other._kept}:
            raise BadArgument("reservoir merge: got rows of a place twice; say with first= which part each one reads")
        for item in other._kept:
            self._offer(item)
        self.seen += other.seen

    def _offer(self, item: tuple[float, int, Tensor]) -> None:
        if len(self._kept) < self.size:
            heapq.heappush(self._kept, item)
        else:
            heapq.heappushpop(self._kept, item)

    @property
    def rows(self) -> Tensor:
        """The rows kept: (min(size, seen), D), in the order of their places; (0, 0) before the first."""
        kept = sorted(self._kept, key=lambda item: item[1])
        return torch.stack([row for _, _, row in kept]) if kept else torch.empty(0, 0)

    def state_dict(self) -> dict[str, Tensor]:
        """All that it holds; with `load` another one goes on from it."""
        kept = sorted(self._kept, key=lambda item: item[1])
        places = torch.tensor([place for _, place, _ in kept], dtype=torch.int64)
        ranks = torch.tensor([-rank for rank, _, _ in kept], dtype=torch.float64)
        return {"seen": torch.tensor(self.seen), "places": places, "ranks": ranks, "rows": self.rows}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Become what `state_dict` of one of the same size and seed had said."""
        self.seen = int(state["seen"])
        held = zip(state["ranks"].tolist(), state["places"].tolist(), state["rows"], strict=True)
        self._kept = [(-rank, place, row) for rank, place, row in held]
        heapq.heapify(self._kept)


def _ranks(seed: int, first: int, count: int) -> np.ndarray:
    """Uniform numbers in [0, 1) of `count` places from `first` on: one block of Philox each, keyed by (seed, place)."""
    key, counter = np.array([seed, 0], dtype=np.uint64), np.array([first, 0, 0, _RANKS], dtype=np.uint64)
    words = np.random.Philox(key=key, counter=counter).random_raw(4 * count)
    return (words.reshape(count, 4)[:, 0] >> np.uint64(11)) * 2.0**-53
