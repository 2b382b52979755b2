"""Ctrl-C and the request to end (SIGTERM), held back where they would leave a run torn."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from inkdrop.bundle import Bundle

__all__ = ["Stopped", "Terminated", "heed_terminate", "hold_interrupts", "note_interrupts"]


class Stopped(KeyboardInterrupt):
    """A training that a signal ended in good order, so that a script which waits for its model does not go on.

    Attributes:
        bundle: the averaged model as far as it came.
    """

    def __init__(self, text: str, bundle: Bundle) -> None:
        super().__init__(text)
        self.bundle = bundle


class Terminated(KeyboardInterrupt):
    """The system asked the process to end (SIGTERM), as clusters do when the time that was given is over."""


def _ours() -> bool:
    """Whether Python's handlers can be set here: signals reach the main thread alone."""
    return threading.current_thread() is threading.main_thread()


@contextmanager
def heed_terminate() -> Iterator[None]:
    """Let SIGTERM raise Terminated within the block, unless somebody else has a handler for it already."""
    if not _ours() or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield
        return

    def end(number: int, frame: FrameType | None) -> None:
        raise Terminated

    signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


@contextmanager
def note_interrupts() -> Iterator[list[str]]:
    """Write down Ctrl-C ("interrupted") and SIGTERM ("terminated") within the block, in place of raising anything.

    For ranks, which have to stop at the same update. Handlers that somebody else has set stay.
    """
    asked: list[str] = []
    ours = (signal.SIG_DFL, signal.default_int_handler)
    kinds = {signal.SIGINT: "interrupted", signal.SIGTERM: "terminated"}
    before = {kind: signal.getsignal(kind) for kind in kinds if _ours() and signal.getsignal(kind) in ours}

    def note(number: int, frame: FrameType | None) -> None:
        asked.append(kinds[signal.Signals(number)])

    for kind in before:
        signal.signal(kind, note)
    try:
        yield asked
    finally:
        for kind, handler in before.items():
            signal.signal(kind, handler)


@contextmanager
def hold_interrupts() -> Iterator[None]:
    """Let Ctrl-C and SIGTERM be heard only after the block, so that what it changes together is changed whole.

    Signals reach the main thread alone; elsewhere, and where C code handles them, this does nothing.
    """
    kinds = [kind for kind in (signal.SIGINT, signal.SIGTERM) if signal.getsignal(kind) is not None]
    if not _ours() or not kinds:
        yield
        return
    held: list[int] = []

    def hold(number: int, frame: FrameType | None) -> None:
        held.append(number)

    before = [(kind, signal.signal(kind, hold)) for kind in kinds]
    try:
        yield
    finally:
        for kind, handler in before:
            signal.signal(kind, handler)
    for number in held[:1]:
        signal.raise_signal(number)
