"""Metadata tables: labels and captions of images, one line a file, in the form of Hugging Face's imagefolder."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Iterator
from pathlib import PurePosixPath
from typing import Any, NamedTuple

from inkdrop.data.store import unsafe
from inkdrop.errors import BadData

__all__ = ["FILE", "LABEL", "TABLES", "TEXT", "Columns", "Row", "read_lines", "read_table"]

TABLES = ("metadata.jsonl", "metadata.csv", "labels.csv")

FILE = ("file_name", "filename", "file", "image", "path")
LABEL = ("label", "class", "category")
TEXT = ("text", "caption")
"""What the columns that are read are called, the first that is there."""


class Columns(NamedTuple):
    """Which columns of a table are read besides those of usual names.

    Attributes:
        label: that of the class; None for label, class or category.
        attributes: those of continuous attributes, numbers in every row.
    """

    label: str | None = None
    attributes: tuple[str, ...] = ()


class Row(NamedTuple):
    """One line of a table.

    Attributes:
        where: table and line, for messages.
        file: the image, relative to the table's folder.
        label: its class name, or None.
        text: its caption, or None.
        values: its attributes, in the order of the columns asked for.
    """

    where: str
    file: str
    label: str | None
    text: str | None
    values: tuple[float, ...] = ()


def read_table(data: bytes, name: str, columns: Columns | None = None) -> list[Row]:
    """The rows of metadata.jsonl, metadata.csv or labels.csv (UTF-8).

    The columns are file_name (or filename, file, image, path), and label (class, category) or text (caption) or both;
    other columns are left alone, but those asked for. A label is a string or a whole number.

    Args:
        data: the content.
        name: of the file, for messages.
        columns: what is read besides.

    Raises:
        BadData: a column asked for that is not there, or an attribute that is no finite number; not such a table, a
            file named twice, or a name that leads outside; the line is named.
    """
    rows: dict[str, Row] = {}
    for where, line in read_lines(data, name):
        row = _row(where, line, columns or Columns())
        if row.file in rows:
            raise BadData(f"{where}: {row.file} is named twice, first in {rows[row.file].where}")
        rows[row.file] = row
    return list(rows.values())


def read_lines(data: bytes, name: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """The lines of such a table as they are: where each is, for messages, and its cells by column, in small letters.

    Raises:
        BadData: not UTF-8, not JSON lines or not CSV.
    """
    try:
        content = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise BadData(f"{name}: not UTF-8 text ({error.reason} at byte {error.start})") from error
    for where, line in _json_lines(content, name) if name.endswith(".jsonl") else _csv_lines(content, name):
        yield where, {key.strip().lower(): value for key, value in line.items() if isinstance(key, str)}


def _json_lines(content: str, name: str) -> Iterator[tuple[str, dict[str, Any]]]:
    for number, text in enumerate(content.split("\n"), start=1):
        if not text.strip():
            continue
        where = f"{name} line {number}"
        try:
            line = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise BadData(f"{where}: not JSON ({error})") from error
        if not isinstance(line, dict):
            raise BadData(f"{where}: got {type(line).__name__}, need an object with file_name")
        yield where, line


def _csv_lines(content: str, name: str) -> Iterator[tuple[str, dict[str, Any]]]:
    reader = csv.DictReader(io.StringIO(content, newline=""), strict=True)
    try:
        for line in reader:
            where = f"{name} line {reader.line_num}"
            if None in line or None in line.values():
                raise BadData(f"{where}: not as many cells as the header has columns")
            yield where, line
    except csv.Error as error:
        raise BadData(f"{name} line {reader.line_num}: not CSV ({error})") from error


def _row(where: str, line: dict[str, Any], columns: Columns) -> Row:
    file = _cell(line, FILE)
    if not isinstance(file, str) or not file.strip():
        raise BadData(f"{where}: no file name; need a column file_name (or {', '.join(FILE[1:])})")
    reason = unsafe(file)
    if reason is not None:
        raise BadData(f"{where}: got {file!r}, {reason}; need a name relative to the table's folder")
    for column in (*([columns.label] if columns.label else []), *columns.attributes):
        if column.lower() not in line:
            raise BadData(f"{where}: no column {column!r}; there are {', '.join(line)}")
    label, text = _cell(line, (columns.label.lower(),) if columns.label else LABEL), _cell(line, TEXT)
    if isinstance(label, bool) or not isinstance(label, str | int | None):
        raise BadData(f"{where}: got the label {label!r}, need a string or a whole number")
    if not isinstance(text, str | None):
        raise BadData(f"{where}: got the text {text!r}, need a string")
    values = tuple(_number(where, column, line[column.lower()]) for column in columns.attributes)
    return Row(where, PurePosixPath(file).as_posix(), None if label in (None, "") else str(label), text or None, values)


def _number(where: str, column: str, value: Any) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if isinstance(value, bool) or not abs(number) < 3e38:  # it must be finite as float32
        raise BadData(f"{where}: got {value!r} for {column}, need a finite number")
    return number


def _cell(line: dict[str, Any], names: tuple[str, ...]) -> Any:
    return next((line[name] for name in names if name in line), None)
