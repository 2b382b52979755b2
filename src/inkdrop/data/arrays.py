"""Arrays: a data set that is held in memory."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence

import torch
from torch import Tensor

from inkdrop.core.cond import Cond
from inkdrop.errors import BadArgument, BadData, BadShape

__all__ = ["SPLITS", "Arrays", "check_rows", "check_split"]

SPLITS = ("train", "test")


def check_split(got: str) -> None:
    """Refuse any split but "train" and "test".

    Raises:
        BadArgument: naming the two.
    """
    if got not in SPLITS:
        raise BadArgument(f"data split: got {got!r}, need one of {', '.join(SPLITS)}")


def check_rows(rows: Sequence[int], count: int, what: str) -> list[int]:
    """The row indices as plain integers, each in [0, count).

    Raises:
        BadArgument: an index outside; negative ones do not count from the end.
    """
    found = [int(row) for row in rows]
    for row in found:
        if not 0 <= row < count:
            raise BadArgument(f"{what} row: got {row}, need 0 to {count - 1}")
    return found


class Arrays:
    """A `core.dataset.Data` over tensors in memory.

    uint8 values v stand for v / ((levels − 1)/2) − 1: v/127.5 − 1 at 256 levels, v/8 − 1 at 17. Floats stand for
    themselves. The tensors are not copied: do not change them afterwards.

    Args:
        values: (N, C, *S), uint8 in [0, levels) or floating point in [-1, 1]; N ≥ 1.
        labels: (N,) integers in [0, len(classes)), or None.
        title: what to call the set in messages, "digits train".
        source: one line: what this is and under which licence.
        classes: the class names; given if and only if there are labels.
        levels: how many equally spaced values a channel takes; 256 for uint8 unless told, None for continuous floats.
        preprocessing: what was done to the content, for the fingerprint.

    Raises:
        BadShape: values without a channel axis, or labels that are not one integer a row.
        BadArgument: labels without class names or the other way round; names given twice.
        BadData: a value or a label outside its range, or not finite; the row is named.
    """

    def __init__(
        self,
        values: Tensor,
        labels: Tensor | None = None,
        *,
        title: str,
        source: str,
        classes: Sequence[str] = (),
        levels: int | None = None,
        preprocessing: str = "",
    ) -> None:
        if values.ndim < 2 or 0 in values.shape:
            raise BadShape(f"{title}: got values of shape {tuple(values.shape)}, need (N, C, *S) without empty axes")
        if values.dtype != torch.uint8 and not values.is_floating_point():
            raise BadShape(f"{title}: got values of {values.dtype}, need uint8 or a floating point type")
        if values.dtype == torch.uint8 and levels is None:
            levels = 256
        most = 256 if values.dtype == torch.uint8 else 65536
        if levels is not None and not 2 <= levels <= most:
            raise BadArgument(f"{title} levels: got {levels}, need 2 to {most} for {values.dtype} values")
        self._values = values.detach().cpu().contiguous()
        self._title = title
        self.shape: tuple[int, ...] = tuple(values.shape[1:])
        self.classes: tuple[str, ...] = tuple(classes)
        self.levels = levels
        self.source = source
        self._check_values()
        self._labels = self._checked_labels(labels)
        self.fingerprint = self._hash(preprocessing)

    def _check_values(self) -> None:
        flat = self._values.flatten(1)
        if flat.dtype == torch.uint8:
            top = self._top()
            bad, allowed = (flat > top).any(1), f"0 to {top:g}"
        else:
            bad, allowed = ~((flat >= -1) & (flat <= 1)).all(1), "[-1, 1]"
        if bad.any():
            row = int(bad.nonzero()[0])
            low, high = float(flat[row].min()), float(flat[row].max())
            raise BadData(
                f"{self.name(row)}: got values in [{low:g}, {high:g}], need {allowed}; "
                f"{int(bad.sum())} of {len(flat)} rows are outside; scale the data first"
            )

    def _top(self) -> int:
        """The greatest integer that a uint8 value may be."""
        return (self.levels or 256) - 1

    def _checked_labels(self, labels: Tensor | None) -> Tensor | None:
        if (labels is None) != (not self.classes):
            got = "labels without class names" if labels is not None else "class names without labels"
            raise BadArgument(f"{self._title}: got {got}; give both or neither")
        if len(set(self.classes)) != len(self.classes):
            raise BadArgument(f"{self._title} classes: got a name twice in {', '.join(self.classes)}")
        if labels is None:
            return None
        if labels.shape != self._values.shape[:1] or labels.is_floating_point() or labels.dtype == torch.bool:
            got = f"{labels.dtype} {tuple(labels.shape)}"
            raise BadShape(f"{self._title} labels: got {got}, need integers of shape ({len(self._values)},)")
        labels = labels.detach().cpu().to(torch.int64)
        bad = (labels < 0) | (labels >= len(self.classes))
        if bad.any():
            row = int(bad.nonzero()[0])
            raise BadData(f"{self.name(row)}: got label {int(labels[row])}, need 0 to {len(self.classes) - 1}")
        return labels

    def _hash(self, preprocessing: str) -> str:
        about = [preprocessing, str(self._values.dtype), list(self._values.shape), self.levels, list(self.classes)]
        total = hashlib.sha256(json.dumps(about).encode())
        for tensor in (self._values, self._labels):
            if tensor is not None:
                total.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
        return total.hexdigest()

    def __len__(self) -> int:
        return len(self._values)

    def take(self, rows: Sequence[int]) -> tuple[Tensor, Cond | None]:
        """The samples at these indices: float32 (B, C, *S) in [-1, 1], and their labels as a Cond.

        Raises:
            BadArgument: an index outside [0, N).
        """
        index = torch.tensor(check_rows(rows, len(self), self._title), dtype=torch.int64)
        x = self._values[index].to(torch.float32)
        if self._values.dtype == torch.uint8:
            x = x / (self._top() / 2) - 1
        return x, None if self._labels is None else Cond(label=self._labels[index])

    def name(self, row: int) -> str:
        """What to call sample `row` in a message: "digits train[17]"."""
        return f"{self._title}[{row}]"
