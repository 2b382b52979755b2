"""Data: what every data set gives, whatever it was read from."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

from torch import Tensor

from inkdrop.core.cond import Cond

__all__ = ["FEW", "Data", "Forward"]

FEW = 100
"""With fewer held-out samples than this, the nearest 1 % of them is merely the nearest one."""


@runtime_checkable
class Data(Protocol):
    """A finite, indexable set of samples in [-1, 1].

    Attributes:
        shape: (C, *S) of one sample: (1, 28, 28) grey images, (2,) points of the plane.
        classes: the class names, label i being classes[i]; () where there are no labels.
        levels: how many equally spaced values a channel can take (256 for 8-bit images); None if continuous.
        source: one line that says what this is and under which licence.
        fingerprint: a hexadecimal hash of the content *and* of its preprocessing; keys every cache.
    """

    shape: tuple[int, ...]
    classes: tuple[str, ...]
    levels: int | None
    source: str
    fingerprint: str

    def __len__(self) -> int: ...

    def take(self, rows: Sequence[int]) -> tuple[Tensor, Cond | None]:
        """The samples at these indices: float32 (B, C, *S) in [-1, 1], and their conditions.

        Threads that make coming batches ask at once (`train.workers`), and so does a look at the model.

        Raises:
            BadData: a sample cannot be read or lies outside [-1, 1]; the message names its file.
        """
        ...

    def name(self, row: int) -> str:
        """What to call sample `row` in a message: its file, or set name and index."""
        ...


@runtime_checkable
class Forward(Data, Protocol):
    """Data that can only be read forwards, quickly: they bring an order of their own, and a state to go on from."""

    def rows_of(self, update: int, batch: int) -> list[int]:
        """The rows of an update, counted from 0; they go on beyond `len` into the next epoch."""
        ...

    def state(self, update: int, batch: int) -> Any:
        """What makes the rows from an update on quick to reach, as plain JSON."""
        ...

    def merged(self, states: Sequence[Any]) -> Any:
        """The state of several processes at one update, each of which has read its own part."""
        ...

    def restore(self, state: Any) -> None:
        """Take up a state that `state` gave."""
        ...
