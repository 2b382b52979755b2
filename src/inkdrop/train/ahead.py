"""Ahead: the batches of a run's updates, made by threads while the net works, and where a stream stands after each."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch

from inkdrop.core.dataset import Forward
from inkdrop.core.noise import Draw
from inkdrop.core.schedule import Schedule
from inkdrop.train.feed import Feed
from inkdrop.train.order import rows_of
from inkdrop.train.prefetch import Batch, Prefetch, pinned

__all__ = ["Ahead"]


class _Made(NamedTuple):
    """The batch of an update, and the state of a stream from which the update after it is read."""

    update: int
    batch: Batch
    state: Any


class Ahead:
    """The batches of updates: pure functions of the update and of the places, whoever makes them and when.

    A batch is always made whole, so that micro-batches of any size see the same numbers. Within `running` threads make
    the coming ones; elsewhere each is made when it is asked for. The newest one is kept, as an update may be tried
    again.

    Args:
        feed: what makes them; several threads use it at once.
        schedule: on which image conditions are noised.
        device: where the net is; for CUDA, batches of threads lie in page-locked memory.
        places: of the batch, those that this process makes; all of them by default.
    """

    def __init__(self, feed: Feed, schedule: Schedule, device: torch.device, places: range | None = None) -> None:
        self.feed, self.train, self.schedule = feed, feed.recipe.train, schedule
        self.places = range(self.train.batch) if places is None else places
        self._cuda, self._pins = device.type == "cuda", False
        self._threads = Prefetch(self._make, workers=0)
        self._newest: _Made | None = None

    def rows(self, update: int) -> Sequence[int]:
        """The samples of an update: of the house's order, or of that of data which can only be read in their own."""
        if isinstance(self.feed.data, Forward):
            return self.feed.data.rows_of(update, self.train.batch)
        return rows_of(update, self.train.batch, len(self.feed.data), self.train.seed)

    def part(self, update: int, rows: Sequence[int], places: range) -> Batch:
        """These samples at these places of an update: cut out of its batch where they are its own, else made now."""
        first, own = self.places.start, self.rows(update)
        inside = places.start >= first and places.stop <= self.places.stop
        if not inside or [own[place] for place in places] != list(rows):
            return self._read(update, rows, places)
        x0, cond = self._whole(update).batch
        cut = slice(places.start - first, places.stop - first)
        return x0[cut], None if cond is None else cond.take(cut)

    def state(self, update: int) -> Any:
        """What a stream needs to go on with this update, as plain JSON, whatever was read ahead; None of other data."""
        if not isinstance(self.feed.data, Forward):
            return None
        if self._newest is not None and self._newest.update == update - 1:
            return self._newest.state
        return self.feed.data.state(update, self.train.batch)

    @contextmanager
    def running(self, last: int) -> Iterator[None]:
        """Let train.workers threads, one for a stream, make the batches before update `last`; they end with this."""
        workers = min(self.train.workers, 1) if isinstance(self.feed.data, Forward) else self.train.workers
        self._pins = self._cuda and workers > 0
        try:
            with Prefetch(self._make, workers=workers, last=last) as self._threads:
                yield
        finally:
            self._threads, self._pins = Prefetch(self._make, workers=0), False

    def _whole(self, update: int) -> _Made:
        if self._newest is None or self._newest.update != update:
            self._newest = None  # its memory is free before the next one is taken
            self._newest = self._threads.take(update)
        return self._newest

    def _make(self, update: int) -> _Made:
        own = self.rows(update)
        batch = self._read(update, [own[place] for place in self.places], self.places)
        data = self.feed.data
        state = data.state(update + 1, self.train.batch) if isinstance(data, Forward) else None
        return _Made(update, pinned(batch) if self._pins else batch, state)

    def _read(self, update: int, rows: Sequence[int], places: range) -> Batch:
        return self.feed.take(rows, Draw(self.train.seed, update, places), self.schedule)
