"""Prefetch: the batches of coming updates, made by threads while the net works on this one."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import replace
from types import TracebackType
from typing import Generic, Self, TypeVar

import torch
from torch import Tensor

from inkdrop.core.cond import Cond
from inkdrop.errors import BadArgument

__all__ = ["Batch", "Prefetch", "pinned"]

T = TypeVar("T")

Batch = tuple[Tensor, Cond | None]
"""What is noised, (B, C, *S), and its conditions."""

_PATIENCE = 5.0  # seconds that an end waits for a thread that is inside a read


class Prefetch(Generic[T]):
    """The batches of updates first, first + 1, ..., each made once, ahead of time, and given out in order.

    `make` is a pure function of the update, so the batches are the same at any number of workers, and a run that is
    taken up at update u goes on with the batch of u. At most `depth` batches wait or are being made. An update that is
    not the next one (a rollback, a repeat) is answered too: what was made ahead is dropped, and counting begins there.

    An error of `make` is raised by `take` at the update that it belongs to, as it is; those before it are given out
    first. `close`, or the end of a `with` block, ends the threads; so does the end of the program.

    Args:
        make: update -> batch; called from several threads at once where workers > 1.
        workers: threads, ≥ 0; 0 makes each batch when it is taken.
        depth: batches made ahead at most, ≥ 1; by default two a worker. Memory: depth batches.
        last: the update after the last one, beyond which nothing is made ahead; None: there is none.

    Raises:
        BadArgument: workers or depth outside their ranges, or a depth without workers.
    """

    def __init__(
        self, make: Callable[[int], T], *, workers: int = 2, depth: int | None = None, last: int | None = None
    ) -> None:
        if workers < 0:
            raise BadArgument(f"prefetch workers: got {workers}, need at least 0")
        if depth is not None and (depth < 1 or workers == 0):
            need = "at least 1" if workers else "none where workers is 0"
            raise BadArgument(f"prefetch depth: got {depth}, need {need}")
        self._make, self._workers, self._last = make, workers, last
        self._depth = 2 * workers if depth is None else depth
        self._changed = threading.Condition()
        self._made: dict[int, T | Exception] = {}
        self._next = self._begun = 0  # the update that is taken next, and the first that no thread has begun
        self._turn = 0  # counts the times that counting began elsewhere: a batch of an older turn is dropped
        self._ended = False
        self._threads: list[threading.Thread] = []

    def take(self, update: int) -> T:
        """The batch of an update, counted from 0; waits until it is made.

        Raises:
            BadArgument: an update below 0 or beyond the last, or after `close`.
        """
        if self._ended or update < 0 or (self._last is not None and update >= self._last):
            got = "a batch after the end" if self._ended else f"update {update}"
            raise BadArgument(f"prefetch: got {got}, need 0 to {'any' if self._last is None else self._last - 1}")
        if not self._workers:
            return self._make(update)
        with self._changed:
            if update != self._next or not self._threads:
                self._restart(update)
            while update not in self._made:
                self._changed.wait()
            made = self._made.pop(update)
            self._next = update + 1
            self._changed.notify_all()
            if isinstance(made, Exception):
                self._restart(update)  # a second try makes it again
                raise made
            return made

    def _restart(self, update: int) -> None:
        """Count from this update on; the caller holds the lock."""
        self._made.clear()
        self._next = self._begun = update
        self._turn += 1
        while len(self._threads) < self._workers:
            name = f"prefetch-{len(self._threads)}"
            self._threads.append(threading.Thread(target=self._work, name=name, daemon=True))
            self._threads[-1].start()
        self._changed.notify_all()

    def _idle(self) -> bool:
        """Whether there is nothing to begin: enough is made ahead, the run is at its end, or an error waits."""
        if self._begun >= self._next + self._depth or (self._last is not None and self._begun >= self._last):
            return True
        return any(isinstance(made, Exception) for made in self._made.values())

    def _work(self) -> None:
        """What each thread does until the end."""
        while True:
            with self._changed:
                while not self._ended and self._idle():
                    self._changed.wait()
                if self._ended:
                    return
                update, turn = self._begun, self._turn
                self._begun += 1
            made: T | Exception
            try:
                made = self._make(update)
            except Exception as error:  # noqa: BLE001 (it is raised where the batch is taken)
                made = error
            with self._changed:
                if turn == self._turn:
                    self._made[update] = made
                    self._changed.notify_all()
            del made  # an idle thread holds no batch

    def close(self) -> None:
        """End the threads; one that is inside a read is waited for, for some seconds. A second call does nothing."""
        with self._changed:
            self._ended = True
            self._made.clear()
            self._changed.notify_all()
        for thread in self._threads:
            thread.join(_PATIENCE)
        self._threads = [thread for thread in self._threads if thread.is_alive()]

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def pinned(batch: Batch) -> Batch:
    """The batch in page-locked memory, from which a copy to a CUDA GPU runs beside the net (non_blocking=True).

    The values are the same; without CUDA there is no such memory, and the batch is returned as it is.
    """
    if not torch.cuda.is_available():
        return batch
    x0, cond = batch
    return x0.pin_memory(), None if cond is None else _pinned(cond)


def _pinned(cond: Cond) -> Cond:
    """The condition with every tensor in page-locked memory."""
    fields = {name: value.pin_memory() for name, value in vars(cond).items() if isinstance(value, Tensor)}
    nulls = {name: null.pin_memory() for name, null in cond.nulls.items()}
    return replace(cond, **fields, nulls=nulls, against=None if cond.against is None else _pinned(cond.against))
