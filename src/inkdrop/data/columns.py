"""Columns: which columns of a metadata table can be a class or attributes, and how a command says so."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from pathlib import PurePosixPath
from typing import Any, NamedTuple

from inkdrop.data.layout import Layout, arrange
from inkdrop.data.metadata import FILE, LABEL, TABLES, TEXT, Columns, read_lines
from inkdrop.data.store import Store
from inkdrop.errors import BadData

__all__ = ["Table", "settings_for", "table_of"]

_MOST_SHARE = 0.5  # of the rows: a column of more values than that names its rows, and does not sort them
_FAR = 3.0  # an attribute beyond this is not about in [-1, 1], where it should be brought first


class Table(NamedTuple):
    """What the metadata tables of a store have besides file names, captions and the class of a usual name.

    Attributes:
        kinds: column -> how many values, of columns that can be the class.
        numbers: column -> (least, greatest), of columns with a finite number in every row.
    """

    kinds: dict[str, int]
    numbers: dict[str, tuple[float, float]]

    @property
    def near(self) -> tuple[str, ...]:
        """The columns of numbers that are about in [-1, 1], and so attributes as they are."""
        return tuple(name for name, ends in self.numbers.items() if max(map(abs, ends)) <= _FAR and ends[0] < ends[1])

    def columns(self, *, labelled: bool) -> Columns:
        """The columns to read besides those of usual names: the first that can be the class, and numbers near 1.

        Args:
            labelled: whether there is a class already.
        """
        label = None if labelled else next((name for name in self.kinds if name not in self.numbers), None)
        return Columns(label, self.near)


def table_of(store: Store) -> Table:
    """What the tables of a store have; nothing where there is none, or one that cannot be read."""
    rows: list[dict[str, Any]] = []
    try:
        for name in store.names:
            if PurePosixPath(name).name in TABLES:
                rows += [line for _, line in read_lines(store.read(name), name)]
    except BadData:
        return Table({}, {})
    names = [name for name in (rows[0] if rows else ()) if all(name in row for row in rows)]
    known = {next((name for name in usual if name in names), "") for usual in (FILE, LABEL, TEXT)}
    found = {name: [row[name] for row in rows] for name in names if name not in known}
    kinds = {name: count for name, values in found.items() if (count := _kinds(values))}
    numbers = {name: ends for name, values in found.items() if (ends := _ends(values))}
    return Table(kinds, numbers)


def _kinds(values: Sequence[Any]) -> int:
    """How many values a column has, if it can be the class: no fractions, 2 or more, of two rows on average; else 0."""
    if not all(isinstance(value, str | int) and not isinstance(value, bool) and value != "" for value in values):
        return 0
    if _ends(values) and not all(re.fullmatch(r"-?[0-9]+", str(value).strip()) for value in values):
        return 0
    count = len({str(value) for value in values})
    return count if 2 <= count <= _MOST_SHARE * len(values) else 0


def _ends(values: Sequence[Any]) -> tuple[float, float] | None:
    """The least and the greatest of a column of numbers; None if one is no finite number."""
    numbers = []
    for value in values:
        try:
            numbers.append(math.nan if isinstance(value, bool) else float(value))
        except (TypeError, ValueError):
            return None
    return (min(numbers), max(numbers)) if all(map(math.isfinite, numbers)) else None


def settings_for(table: Table, store: Store, layout: Layout, train: Sequence[int]) -> list[str]:
    """What a command sets for a model that is told what a table has: "data.label=kind", "text=bpe".

    Args:
        table: of the store.
        store: the files.
        layout: of the store where no column is named.
        train: the rows of its training split; captions are read where one of them has one.
    """
    columns = table.columns(labelled=bool(layout.classes))
    try:
        there = arrange(store, columns)
    except BadData:  # a suggestion only: without these columns the folder can be trained on
        columns = Columns()
    else:
        if len(there.entries) != len(layout.entries) or len(there.classes) < len(layout.classes):
            columns = Columns()
    found = [] if columns.label is None else [f"data.label={_written(columns.label)}"]
    if columns.attributes:
        plain = all(_written(name) == name for name in columns.attributes)
        found.append(f"data.attributes={','.join(columns.attributes) if plain else json.dumps(columns.attributes)}")
    return [*found, "text=bpe"] if any(layout.entries[row].text for row in train) else found


def _written(name: str) -> str:
    """A column's name as --set reads it back as text: in quotes where it could be a number, a list or a constant."""
    plain = re.fullmatch(r"[^\W\d][\w .-]*", name) and name not in ("true", "false", "null")
    return name if plain else json.dumps(name)
