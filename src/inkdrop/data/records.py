"""Records: a data set that is read piece by piece from somewhere larger than memory; only what is taken is decoded.

What a folder of images learns by looking at every file (one size, one set of channels) is learned here from a few
images, and every other one is checked when its turn comes.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol, overload

import numpy as np
import torch
from torch import Tensor

from inkdrop.core.cond import Cond
from inkdrop.data.arrays import check_rows
from inkdrop.data.form import Form, Wish, infer
from inkdrop.data.images import decode, inspect
from inkdrop.errors import BadArgument, BadData

__all__ = ["PROBED", "Captions", "Record", "Records", "Source", "batch_of", "held_out", "probe"]

PROBED = 64
"""How many images, evenly spaced, the form of all is inferred from."""


class Record(NamedTuple):
    """One sample as it is stored.

    Attributes:
        image: the bytes of its image's file.
        label: its class in [0, classes), or None.
        values: its continuous attributes.
    """

    image: bytes
    label: int | None = None
    values: tuple[float, ...] = ()


class Source(Protocol):
    """Where records are.

    Attributes:
        title: what to call it in messages.
        kind: what it is, for people: "120 tar shards".
        classes: the class names, label i being classes[i]; () where there are no labels.
        attributes: the names of the continuous attributes.
        has_texts: whether there are captions.
        digest: a hexadecimal hash of what is known of the content without decoding it.
    """

    title: str
    kind: str
    classes: tuple[str, ...]
    attributes: tuple[str, ...]
    has_texts: bool
    digest: str

    def __len__(self) -> int: ...

    def records(self, numbers: Sequence[int]) -> list[Record]:
        """The records of these numbers; safe in several threads at once.

        Raises:
            BadData: one cannot be read; the message names it.
        """
        ...

    def text(self, number: int) -> str | None:
        """The caption of a record."""
        ...

    def name(self, number: int) -> str:
        """What to call a record in a message."""
        ...

    def places(self) -> Iterator[np.ndarray]:
        """For every record in order, in blocks, uint64 that are uniform on [0, 2^64): the hold-out is drawn by them."""
        ...


def held_out(source: Source, share: float) -> np.ndarray:
    """The numbers of the records that are held out, ascending, int64: those whose place is below share·2^64.

    At least one is held out and at least one is not, if there are two and the share is not 0. Memory: 8 bytes for each
    one held out.

    Raises:
        BadArgument: a share outside [0, 1).
    """
    if not 0 <= share < 1:
        raise BadArgument(f"data holdout: got {share}, need a share in [0, 1)")
    cut, first, found = np.uint64(int(share * 2**64)), 0, [np.empty(0, np.int64)]
    least: list[tuple[int, int]] = []
    most: list[tuple[int, int]] = []
    for block in source.places():
        found.append(first + np.flatnonzero(block < cut))
        if len(block):
            least.append((int(block.min()), first + int(block.argmin())))
            most.append((int(block.max()), first + int(block.argmax())))
            least, most = [min(least)], [max(most)]
        first += len(block)
    held = np.concatenate(found)
    if share and first >= 2:
        if not len(held):
            return np.array([least[0][1]])
        if len(held) == first:
            return np.delete(held, most[0][1])
    return held


class Records:
    """A `core.dataset.Data` of a split of a source.

    Memory: what is taken, and 16 bytes for each record that is held out.

    Attributes:
        texts: the captions, read one by one when they are asked for, or None if there are none.
        attributes: the names of the continuous attributes, in order.
        form: the shape and channels that every image is brought to.

    Args:
        source: where they are.
        split: "train" or "test".
        held: the numbers of those of the test split, ascending.
        wish: what the caller asked for.

    Raises:
        BadData: the split is empty, or a probed image cannot be read, or they are of several sizes.
        BadArgument: an option that has no effect.
    """

    def __init__(self, source: Source, split: str, held: np.ndarray, wish: Wish) -> None:
        self._source, self._held, self._test, self._wish = source, held, split == "test", wish
        self._before = held - np.arange(len(held))  # how many of the training split come before each held-out one
        self._count = len(held) if self._test else len(source) - len(held)
        if not self._count:
            raise BadData(
                f"{source.title}: no images for the {split} split: {len(held)} of {len(source)} are held out; "
                "try another holdout"
            )
        self.form, seen = probe(source, wish)
        self.shape: tuple[int, ...] = (self.form.bands, *self.form.size)
        self.classes, self.attributes = source.classes, source.attributes
        self.levels = self.form.levels
        self.source = f"{source.title} ({source.kind}), the user's own images, under their own licence"
        self.texts: Captions | None = Captions(self._count, self._text) if source.has_texts else None
        about = [self.form, source.classes, source.attributes, source.digest, seen, split]
        total = hashlib.sha256(json.dumps(["records 1", *about]).encode())
        total.update(held.astype("<i8").data)
        self.fingerprint = total.hexdigest()

    def __len__(self) -> int:
        return self._count

    def numbers(self, rows: Sequence[int]) -> list[int]:
        """The numbers in the source of these rows of the split.

        Row r of the training split is number r + k, where k held-out ones come before it: those of which at most r
        training ones come before.

        Raises:
            BadArgument: an index outside [0, N).
        """
        found = check_rows(rows, self._count, self._source.title)
        if self._test:
            return [int(number) for number in self._held[found]]
        return [row + int(k) for row, k in zip(found, np.searchsorted(self._before, found, "right"), strict=True)]

    def take(self, rows: Sequence[int]) -> tuple[Tensor, Cond | None]:
        """The images at these indices: float32 (B, C, H, W) in [-1, 1], with their labels and attributes as a Cond.

        Raises:
            BadArgument: an index outside [0, N).
            BadData: an image cannot be read, or is not of the form of the others; the message names it.
        """
        numbers = self.numbers(rows)
        records = self._source.records(numbers)
        return batch_of(records, self.form, self._wish, lambda i: self._source.name(numbers[i]))

    def name(self, row: int) -> str:
        """The file of an image, or its row where it has none."""
        return self._source.name(self.numbers([row])[0])

    def _text(self, row: int) -> str | None:
        return self._source.text(self.numbers([row])[0])


class Captions(Sequence["str | None"]):
    """Captions that are read when they are asked for.

    Args:
        count: how many.
        read: row -> caption, or None where the row has none.
        endless: whether rows go on beyond the count, as a stream's do into its next epoch.
    """

    def __init__(self, count: int, read: Callable[[int], str | None], *, endless: bool = False) -> None:
        self._count, self._read, self._endless = count, read, endless

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[str | None]:
        return (self._read(row) for row in range(self._count))

    @overload
    def __getitem__(self, row: int) -> str | None: ...
    @overload
    def __getitem__(self, row: slice) -> list[str | None]: ...
    def __getitem__(self, row: int | slice) -> str | list[str | None] | None:
        """The caption of a row in [0, N), or those of a slice."""
        if isinstance(row, slice):
            return [self._read(each) for each in range(*row.indices(self._count))]
        if row < 0 or (row >= self._count and not self._endless):
            raise IndexError(f"caption: got row {row}, need 0 to {self._count - 1}")
        return self._read(row)


def probe(source: Source, wish: Wish) -> tuple[Form, str]:
    """The form of all images, inferred from at most PROBED of them, evenly spaced, and a hash of their bytes.

    Raises:
        BadData: one of them cannot be read, or they are of several sizes or kinds.
        BadArgument: an option that has no effect on them.
    """
    count = min(PROBED, len(source))
    numbers = [i * len(source) // count for i in range(count)]
    headers, total = [], hashlib.sha256()
    for number, record in zip(numbers, source.records(numbers), strict=True):
        try:
            headers.append(inspect(record.image, _kind(record.image)))
        except BadData as error:
            raise BadData(f"{source.name(number)}: {_reason(error)}") from error
        total.update(hashlib.sha256(record.image).digest())
    names = [f"number {number}" for number in numbers]
    return infer(headers, names, wish, Path(source.title)), total.hexdigest()


def batch_of(
    records: Sequence[Record], form: Form, wish: Wish, name: Callable[[int], str]
) -> tuple[Tensor, Cond | None]:
    """The images of records, float32 (B, C, H, W) in [-1, 1], and their conditions.

    Args:
        records: in the order of the batch; all with a label or none.
        form: what each is brought to.
        wish: what the caller asked for.
        name: place in the batch -> what to call that record in a message.

    Raises:
        BadData: an image cannot be decoded, or something of it would be lost that the probed images did not have:
            another size without `resize`, colour among grey images, more bits.
    """
    pixels = np.empty((len(records), form.bands, *form.size), dtype=form.dtype)
    for i, record in enumerate(records):
        try:
            pixels[i] = _bring(record.image, form, wish)
        except BadData as error:
            raise BadData(f"{name(i)}: {_reason(error)}") from error
    labels = [record.label for record in records if record.label is not None]
    values = [record.values for record in records if record.values]
    label = torch.tensor(labels, dtype=torch.int64) if labels else None
    cond = Cond(label=label, vec=torch.tensor(values, dtype=torch.float32) if values else None)
    return torch.from_numpy(form.floats(pixels)), cond if cond.present else None


def _kind(image: bytes) -> str:
    """A name under which bytes are decoded by what they are: an array or a picture."""
    return "image.npy" if image.startswith(b"\x93NUMPY") else "image"


def _reason(error: BadData) -> str:
    """What is wrong, without the name under which it was decoded."""
    return str(error).removeprefix("image.npy: ").removeprefix("image: ")


def _bring(image: bytes, form: Form, wish: Wish) -> np.ndarray:
    """The pixels of an image in the form of all, (C, H, W)."""
    header, pixels = decode(image, _kind(image))
    if form.resize == "none" and (header.height, header.width) != form.size:
        side = form.size[0] if form.size[0] == form.size[1] else list(form.size)
        got = f"{header.height}×{header.width} pixels among images of {form.size[0]}×{form.size[1]}"
        raise BadData(f"{got}; try --set data.resize=crop --set data.size={side}")
    if header.raw != (form.channels == "raw"):
        raise BadData("a .npy among pictures, or a picture among .npy; keep one kind")
    if form.channels == "grey" and wish.channels == "auto" and header.bands != 1:
        raise BadData("a colour image among grey ones; try --set data.channels=rgb, or grey")
    if np.dtype(header.dtype).itemsize > np.dtype(form.dtype).itemsize:
        raise BadData(f"{header.dtype} among images of {form.dtype}; convert it, or keep it elsewhere")
    return form.bring(pixels)
