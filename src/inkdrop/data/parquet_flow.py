"""Flow: the files of an iterable table, each to be read forwards, and the rows that are held out of it."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from inkdrop.data.parquet import mixed
from inkdrop.data.parquet_columns import Columns, Reading, columns_of, datasets_package
from inkdrop.data.records import Record
from inkdrop.errors import BadArgument

__all__ = ["Flow"]


class Flow:
    """An iterable data set in pieces, whose first rows are held out; a `records.Source` of those.

    Args:
        rows: the data set.
        columns: which are asked for.
        title: what to call it in messages.
        digest: a hash of its content.
        held: how many rows of the first file are held out, ≥ 1.
        values: column -> its distinct values; None where they are not to be had.

    Attributes:
        held: the rows that are held out, in memory.
        reading: how a row becomes a record.

    Raises:
        BadArgument: nothing held out.
        BadData: a column is not there, or its classes are not known.
    """

    def __init__(
        self,
        rows: Any,
        columns: Columns,
        title: str,
        digest: str,
        held: int,
        values: Callable[[str], Iterator[Any]] | None,
    ) -> None:
        if held < 1:
            raise BadArgument(f"stream held: got {held}, need at least 1")
        package = datasets_package()
        found = columns_of(rows.features, columns, title)
        named = not found.label or hasattr(rows.features[found.label], "names")
        self.reading = Reading(
            rows.features, found, None if named or values is None else values(found.label or ""), title
        )
        for name in found.read:
            if type(rows.features[name]).__name__ == "Image":
                rows = rows.cast_column(name, package.Image(decode=False))
        self._rows = rows.select_columns(found.read)
        self.title, self.kind, self.classes = title, "a parquet stream", self.reading.classes
        self.attributes, self.has_texts = found.attributes, bool(found.caption)
        self.digest = hashlib.sha256(json.dumps([digest, found, held]).encode()).hexdigest()
        self.held = list(itertools.islice(self.piece(0, skip=0), held))

    @property
    def pieces(self) -> int:
        """How many files there are."""
        return int(self._rows.num_shards)

    def piece(self, index: int, *, skip: int | None = None) -> Any:
        """The rows of one file, without those that are held out."""
        piece = self._rows.shard(num_shards=self.pieces, index=index)
        skip = (len(self.held) if index == 0 else 0) if skip is None else skip
        return piece.skip(skip) if skip else piece

    def __len__(self) -> int:
        return len(self.held)

    def records(self, numbers: Sequence[int]) -> list[Record]:
        """The held-out rows of these numbers."""
        return [self.reading.record(self.held[number], self.name(number)) for number in numbers]

    def text(self, number: int) -> str | None:
        """The caption of a held-out row."""
        return self.reading.text(self.held[number])

    def name(self, number: int) -> str:
        """The stream and the row's number."""
        return f"{self.title} row {number}"

    def places(self) -> Iterator[np.ndarray]:
        """A hash of each row's number."""
        yield mixed(np.arange(len(self.held), dtype=np.uint64))
