"""The log of a run: stats.jsonl, one JSON object a line, and the same numbers for TensorBoard."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from inkdrop.errors import BadArgument, MissingExtra
from inkdrop.parallel import ALONE, Ranks
from inkdrop.train.record import write_atomically

__all__ = ["Log", "scalars"]


class Log:
    """What a run writes down as it goes, each line whole or not at all.

    Every line has "update", the updates that were done when it was written; it never falls, as `cut` takes away what a
    return to an earlier checkpoint undid.

    Args:
        folder: of the run.
        tensorboard: write the numbers into folder/tensorboard too.
        ranks: rank 0 writes; what goes wrong there is told to all.

    Raises:
        MissingExtra: tensorboard is asked for and not installed.
    """

    def __init__(self, folder: Path, *, tensorboard: bool = False, ranks: Ranks = ALONE) -> None:
        self.path, self._board, self._ranks = folder / "stats.jsonl", None, ranks
        if tensorboard and ranks.first:
            self._board = _Board(folder / "tensorboard")

    def __enter__(self) -> Log:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._board is not None:
            self._board.close()

    def write(self, update: int, *lines: Mapping[str, Any]) -> None:
        """Add lines at an update.

        Raises:
            BadArgument: the disk is full, or the like; the file is as it was before.
        """
        self._ranks.lead(lambda: self._write(update, lines))

    def _write(self, update: int, lines: Sequence[Mapping[str, Any]]) -> None:
        text = "".join(json.dumps({"update": update, **facts}, allow_nan=False) + "\n" for facts in lines)
        try:
            _append(self.path, text.encode())
        except OSError as error:
            raise BadArgument(
                f"{self.path}: cannot be written ({error.strerror}); free some space or choose another place"
            ) from None
        if self._board is not None:
            for facts in lines:
                self._board.write(update, facts)

    def cut(self, update: int, rollbacks: int, *, looked: bool) -> None:
        """Drop what an unbroken run would not have written by this update: later lines, and one that was cut off.

        Args:
            update: from which the run goes on.
            rollbacks: how often it has gone back by then; a line about a later return is dropped.
            looked: whether the look at this update was due; one taken because the run stopped here is dropped.
        """
        self._ranks.lead(lambda: self._cut(update, rollbacks, looked))

    def _cut(self, update: int, rollbacks: int, looked: bool) -> None:
        kept = []
        for text in self.path.read_text(encoding="utf-8").splitlines() if self.path.exists() else ():
            try:
                line = json.loads(text)
            except ValueError:
                break
            if line["update"] > update:
                break
            last = line["update"] == update
            if line.get("rollback", 0) <= rollbacks and not (
                last and ("copies" in line or (_look(line) and not looked))
            ):
                kept.append(f"{text}\n")
        write_atomically(self.path, "".join(kept))
        if self._board is not None:
            self._board.purge(update)


def _look(line: Mapping[str, Any]) -> bool:
    """Whether a line was written by a look: at held-out data, at the colours of samples, at how the loss goes."""
    return any(key in line for key in ("held_out", "colour", "advice"))


def _append(path: Path, content: bytes) -> None:
    """Add bytes to a file, all or none of them."""
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        size = os.fstat(handle).st_size
        try:
            left = memoryview(content)
            while left:
                left = left[os.write(handle, left) :]
        except OSError:
            os.ftruncate(handle, size)
            raise
    finally:
        os.close(handle)


def scalars(facts: Mapping[str, Any], name: str = "") -> Iterator[tuple[str, float]]:
    """The numbers in nested facts, by names joined with "/"; those of a list by their place, counted from 0."""
    for key, value in facts.items():
        full = f"{name}/{key}" if name else str(key)
        if isinstance(value, Mapping):
            yield from scalars(value, full)
        elif isinstance(value, list | tuple):
            yield from scalars({str(i): each for i, each in enumerate(value)}, full)
        elif isinstance(value, int | float) and not isinstance(value, bool):
            yield full, float(value)


class _Board:
    """TensorBoard's own files of the same numbers; those of an update that is undone are marked as such.

    Args:
        folder: where they are.
    """

    def __init__(self, folder: Path) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise MissingExtra("train.tensorboard", "tensorboard", "track") from None
        self._make: Callable[..., Any] = SummaryWriter
        self._folder, self._writer = str(folder), list[Any]()
        self._purge: int | None = None

    def write(self, update: int, facts: Mapping[str, Any]) -> None:
        """Add the numbers of a line; those of an update itself stand under train/."""
        if not self._writer:
            self._writer.append(self._make(self._folder, purge_step=self._purge))
        for name, value in scalars(facts):
            self._writer[0].add_scalar(name if "/" in name else f"train/{name}", value, update)

    def purge(self, update: int) -> None:
        """Mark what was written after this update as undone."""
        self.close()
        self._purge = update + 1

    def close(self) -> None:
        """Write out what is waiting."""
        while self._writer:
            self._writer.pop().close()
