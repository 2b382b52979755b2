"""The columns of a table of Hugging Face `datasets`: which hold image, class, caption and attributes."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from inkdrop.data.records import Record
from inkdrop.data.store import natural
from inkdrop.errors import BadData, MissingExtra

__all__ = ["Columns", "Reading", "columns_of", "datasets_package"]

_IMAGE = ("image", "img", "jpg", "png", "webp")
_LABEL = ("label", "class", "category")
_TEXT = ("text", "caption")


def datasets_package() -> Any:
    """The package `datasets`, its progress bars off.

    Raises:
        MissingExtra: it is not installed.
    """
    try:
        import datasets
    except ImportError:
        raise MissingExtra("data from parquet", "datasets", "data") from None
    datasets.disable_progress_bars()
    return datasets


class Columns(NamedTuple):
    """The names of columns; None for what is to be found by its usual name, "" for what is not there.

    Attributes:
        image: of encoded images (PNG, JPEG, ...): the type Image of `datasets`, or plain bytes.
        label: of classes: the type ClassLabel, whole numbers, or strings.
        caption: of strings.
        attributes: of numbers.
    """

    image: str | None = None
    label: str | None = None
    caption: str | None = None
    attributes: tuple[str, ...] = ()

    @property
    def read(self) -> list[str]:
        """Those that are read."""
        return [name for name in (self.image, self.label, self.caption, *self.attributes) if name]


def columns_of(features: Mapping[str, Any] | None, wanted: Columns, title: str) -> Columns:
    """The columns of a table with these features, each found or "".

    Raises:
        BadData: a column that is asked for is not there, or there is none of images.
    """
    if not features:
        raise BadData(f"{title}: does not say which columns it has; download it and read it as parquet")
    known = ", ".join(features)
    for name in wanted.read:
        if name not in features:
            raise BadData(f"{title}: no column {name!r}; there are {known}")
    typed = [name for name, feature in features.items() if type(feature).__name__ == "Image"]
    image = wanted.image or next((name for name in (*typed, *_IMAGE) if name in features), None)
    if image is None:
        raise BadData(f"{title}: no column of images; there are {known}; name one with --set data.image=...")
    label = wanted.label or next((name for name in _LABEL if name in features), "")
    caption = wanted.caption or next((name for name in _TEXT if name in features), "")
    return Columns(image, label, caption, wanted.attributes)


class Reading:
    """How a row becomes a record.

    Args:
        features: of the table, by column.
        columns: which are read, as `columns_of` gives them.
        labels: the values of the label's column where its type does not name the classes; None if not known.
        title: what to call the table in messages.

    Attributes:
        classes: the class names: those of ClassLabel in its order, else the distinct values in natural order.

    Raises:
        BadData: a label's column without names of classes.
    """

    def __init__(self, features: Mapping[str, Any], columns: Columns, labels: Iterable[Any] | None, title: str) -> None:
        self.columns, self.title = columns, title
        names = getattr(features[columns.label], "names", None) if columns.label else ()
        self._by_value: dict[Any, int] | None = None
        if names is None:
            if labels is None:
                raise BadData(f"{title}: {columns.label!r} is no ClassLabel, so its classes are not known in advance")
            distinct = {value for value in labels if value is not None}
            odd = next((v for v in distinct if isinstance(v, bool) or not isinstance(v, int | str)), None)
            if odd is not None:
                raise BadData(f"{title}: got the label {odd!r} in {columns.label!r}, need strings or whole numbers")
            ordered = sorted(distinct, key=lambda value: natural(str(value)))
            self._by_value = {value: i for i, value in enumerate(ordered)}
            names = [str(value) for value in ordered]
        self.classes: tuple[str, ...] = tuple(names)

    def record(self, row: Mapping[str, Any], name: str) -> Record:
        """The record of a row.

        Raises:
            BadData: no image in it, no label though the table has labels, or an attribute that is no finite number.
        """
        columns = self.columns
        image = row[columns.image or ""]
        if isinstance(image, Mapping):
            if image.get("bytes") is None:
                raise BadData(
                    f"{name}: holds no image but {image.get('path') or 'nothing'!r}; files outside a table are not read"
                )
            image = image["bytes"]
        if not isinstance(image, bytes):
            raise BadData(f"{name}: got {type(image).__name__} in {columns.image!r}, need an encoded image")
        values = tuple(_number(row[attribute], attribute, name) for attribute in columns.attributes)
        return Record(image, self._label(row, name), values)

    def _label(self, row: Mapping[str, Any], name: str) -> int | None:
        if not self.columns.label:
            return None
        value = row[self.columns.label]
        label = value if self._by_value is None else self._by_value.get(value)
        if label is None or not 0 <= label < len(self.classes):
            raise BadData(f"{name}: got the label {value!r}, need one of {len(self.classes)} classes")
        return int(label)

    def text(self, row: Mapping[str, Any]) -> str | None:
        """The caption of a row, None where it is empty or there are none."""
        text = row[self.columns.caption] if self.columns.caption else None
        if isinstance(text, Sequence) and not isinstance(text, str):  # several captions: the first
            text = text[0] if text else None
        return text.strip() or None if isinstance(text, str) else None


def _number(value: Any, column: str, name: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or abs(value) > 3e38:
        raise BadData(f"{name}: got {value!r} for {column}, need a finite number")
    return float(value)
