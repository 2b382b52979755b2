"""Lanes: a stream that can only be read forwards, cut into independent lanes and shuffled in windows.

A lane owns every L-th piece (file) of the source. In an epoch it reads its pieces in an order drawn by (seed, lane,
epoch), one after the other, and begins again. What it reads is cut into windows of W samples, counted over all epochs,
and each window is permuted by a draw of (seed, lane, window). So the sample at a position of a lane is a function of
the position alone, whoever asks, in whatever order, on whatever rank; a state only saves reading up to there.
"""

from __future__ import annotations

import hashlib
import threading
import weakref
from collections.abc import Callable, Generator, Mapping, Sequence
from functools import partial
from itertools import islice
from typing import Any, TypeAlias

from inkdrop.core.noise import generator
from inkdrop.errors import BadArgument, BadCheckpoint, BadData

__all__ = ["Lane"]

_Rows: TypeAlias = Generator[tuple[Mapping[str, Any], Callable[[], dict[str, Any]]], None, None]
"""Rows, each with what tells the state after it."""

_KEPT = 2  # windows whose samples stay in memory
_STATES = 8  # windows whose beginnings are remembered


class Lane:
    """One lane: position -> row, from windows that are read forwards.

    Args:
        pieces: each opens an iterable that has `state_dict` and `load_state_dict`; they end.
        window: samples shuffled together, ≥ 1; two windows are held in memory.
        seed: of the order.
        lane: its number.
        title: what to call the stream in messages.
    """

    def __init__(self, pieces: Sequence[Callable[[], Any]], window: int, seed: int, lane: int, title: str) -> None:
        self._pieces, self._window, self._seed, self._lane, self._title = pieces, window, seed, lane, title
        self._stream = int.from_bytes(hashlib.sha256(f"inkdrop stream {lane}".encode()).digest()[:8], "big")
        self._lock = threading.Lock()
        self._windows: dict[int, list[Mapping[str, Any]]] = {}
        self._begins: dict[int, dict[str, Any]] = {0: {"epoch": 0, "turn": 0, "piece": None}}
        self._next = -1  # the window that the open iterator would read
        self._open: list[_Rows] = []  # at most one
        weakref.finalize(self, _close, self._open)  # Arrow's iterators must end before the interpreter does

    def row(self, position: int) -> Mapping[str, Any]:
        """The row at a position of the lane, counted from 0 over all epochs; safe in several threads at once.

        Going forwards costs one read a sample; going back costs reading again from the nearest window whose beginning
        is known.

        Raises:
            BadData: a piece cannot be read, or the lane is empty.
        """
        window, place = divmod(position, self._window)
        with self._lock:
            if window not in self._windows:
                self._read(window)
            return self._windows[window][place]

    def _read(self, window: int) -> None:
        """Read this window, from the open iterator if it comes next; the caller holds the lock."""
        if not 0 <= self._next <= window:
            self._next = max(known for known in self._begins if known <= window)
            _close(self._open)
            self._open.append(self._forwards(self._begins[self._next]))
        while self._next <= window:
            number, self._next = self._next, -1  # an error on the way leaves no half-read iterator behind
            try:
                read = list(islice(self._open[0], self._window))
                state = read[-1][1]()
            except BadData:
                raise
            except Exception as error:  # whatever the network, `datasets` and Arrow raise
                at, reason = number * self._window, " ".join(f"{type(error).__name__}: {error}".split())[:200]
                raise BadData(
                    f"{self._title} lane {self._lane}: cannot be read from sample {at} on ({reason})"
                ) from error
            self._next = number + 1
            order = generator(self._seed, self._stream, number).permutation(self._window)
            self._windows[number], self._begins[number + 1] = [read[i][0] for i in order], state
            while len(self._windows) > _KEPT:
                del self._windows[next(iter(self._windows))]  # that which was read first
            for old in sorted(self._begins)[1:-_STATES]:
                del self._begins[old]

    def _forwards(self, state: dict[str, Any]) -> _Rows:
        """Rows without end from a state on, each with what tells the state after it."""
        epoch, turn, inside = state["epoch"], state["turn"], state["piece"]
        while True:
            order = generator(self._seed, self._stream, 2**63 + epoch).permutation(len(self._pieces))
            count = 0 if turn == 0 and inside is None else 1  # an epoch that is taken up has had samples
            for at in range(turn, len(order)):
                piece = self._pieces[int(order[at])]()
                if inside is not None:
                    piece.load_state_dict(inside)
                    inside = None
                after = partial(_after, epoch, at, piece)
                for row in piece:
                    count += 1
                    yield row, after
            if not count:
                raise BadData(f"{self._title}: lane {self._lane} of the stream holds no samples; try fewer lanes")
            epoch, turn = epoch + 1, 0

    def state(self, position: int) -> dict[str, Any]:
        """What makes the rows from a position on quick to reach: plain JSON."""
        with self._lock:
            window = max(known for known in self._begins if known <= position // self._window)
            return {"window": window, **self._begins[window]}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Take up a state.

        Raises:
            BadCheckpoint: it is no such state.
        """
        try:
            window, known = int(state["window"]), {name: state[name] for name in ("epoch", "turn", "piece")}
        except (KeyError, TypeError, ValueError) as error:
            raise BadCheckpoint(f"{self._title}: the stream's state cannot be read ({error})") from None
        if window < 0:
            raise BadArgument(f"stream state: got window {window}, need at least 0")
        with self._lock:
            self._begins[window] = known
            self._windows.clear()
            self._next = -1


def _after(epoch: int, turn: int, piece: Any) -> dict[str, Any]:
    """The state after the row that was read last."""
    return {"epoch": epoch, "turn": turn, "piece": piece.state_dict()}


def _close(rows: list[_Rows]) -> None:
    """End the generators of a list, and empty it."""
    while rows:
        rows.pop().close()
