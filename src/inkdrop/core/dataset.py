"""Data: what every data set gives, whatever it was read from."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

from torch import Tensor

from inkdrop.core.cond import Cond

__all__ = ["Data"]


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

        Raises:
            BadData: a sample cannot be read or lies outside [-1, 1]; the message names its file.
        """
        ...

    def name(self, row: int) -> str:
        """What to call sample `row` in a message: its file, or set name and index."""
        ...
