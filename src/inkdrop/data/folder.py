"""Any folder or zip of images as a data set; channels, size and classes are inferred from the whole of it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from inkdrop.core.cond import Cond
from inkdrop.data.arrays import check_rows, check_split
from inkdrop.data.form import Form, Wish, infer
from inkdrop.data.images import Header, Resize, decode, inspect, resized
from inkdrop.data.layout import Entry, Layout, arrange
from inkdrop.data.metadata import Columns
from inkdrop.data.store import Problem, Store, open_store
from inkdrop.errors import BadArgument, BadData

__all__ = ["HOLDOUT", "Pictures", "divide", "folder"]

HOLDOUT = 0.05
_ROOM = 1 << 31  # bytes of decoded pixels that are kept in memory


def folder(
    split: str,
    *,
    data: Path,
    size: int | tuple[int, int] | None = None,
    resize: Resize = "none",
    channels: Literal["auto", "grey", "rgb", "rgba"] = "auto",
    background: Literal["white", "black"] = "white",
    label: str | None = None,
    attributes: tuple[str, ...] = (),
    holdout: float = HOLDOUT,
    cache: bool = True,
) -> Pictures:
    """Any folder or zip of images: class folders, train/ and test/, a metadata table, or just images.

    Without a folder for tests, an image is held out where SHA-256 of its name, as a number in [0, 1), is below
    `holdout`: images added later move none from one split to the other. At least one is held out, and one is not.

    Args:
        split: "train" or "test".
        data: the folder or zip.
        size: height and width in pixels, or (height, width); by default that of the images, which must be of one size.
        resize: what to do with images of another size: "none" refuses them, "crop" scales the short side and cuts the
            middle out, "stretch" scales both sides.
        channels: "auto" keeps grey if all images are grey, keeps alpha if all have one, and is RGB otherwise.
        background: what an alpha that is not kept is laid over.
        label: the column of the metadata table that holds the class; label, class or category by default.
        attributes: columns of the table that hold numbers, which become continuous attributes as they are; bring them
            to a range of about [-1, 1].
        holdout: the share held out, in [0, 1); 0 holds none out.
        cache: whether the decoded pixels stay in memory if they take at most 2 GiB; the files are then decoded at once,
            so that a damaged one is found before training, not during it.

    Raises:
        BadArgument: an option outside its range, or one that has no effect.
        BadData: no images, unreadable ones, mixed sizes or kinds; or the split is empty.
    """
    check_split(split)
    wish = Wish.of(size, resize, channels, background)
    store = open_store(data)
    layout = arrange(store, Columns(label, tuple(attributes)) if label or attributes else None)
    rows = divide(layout, split, holdout, store.path)
    scan = _scan(store, layout.entries, set(rows), wish, _ROOM if cache else 0)
    if scan.problems:
        raise BadData(_unreadable(store.path, scan.problems, len(layout.entries) + len(store.refused)))
    form = infer(scan.headers, [entry.file for entry in layout.entries], wish, store.path)
    entries = [layout.entries[row] for row in rows]
    return Pictures(store, layout, entries, scan.digests, form, scan.pixels, tuple(attributes))


class Pictures:
    """A `core.dataset.Data` of the images of a folder or zip.

    Attributes:
        texts: the caption of each row (None where a row has none), or None if no row has one; they are not part of
            the conditions, for a recipe says how they are read.
        attributes: the names of the continuous attributes, in order.
        form: the shape and channels that every image is brought to.

    Args:
        store: where the files are.
        layout: what was recognised in it.
        entries: the images of this split.
        digests: the hash of the bytes of each.
        form: what they are brought to.
        pixels: what they decode to, or None to decode them when they are taken; emptied.
        attributes: the names of the entries' values.
    """

    def __init__(
        self,
        store: Store,
        layout: Layout,
        entries: Sequence[Entry],
        digests: Sequence[str],
        form: Form,
        pixels: list[np.ndarray] | None = None,
        attributes: tuple[str, ...] = (),
    ) -> None:
        self._store, self._entries, self.form = store, tuple(entries), form
        self.shape: tuple[int, ...] = (form.bands, *form.size)
        self.classes, self.attributes = layout.classes, attributes
        self._values = torch.tensor([entry.values for entry in entries], dtype=torch.float32)
        self.levels = form.levels
        self.source = f"{store.path.name or store.path} ({layout.kind}), the user's own images, under their own licence"
        self.texts = tuple(entry.text for entry in entries) if any(entry.text for entry in entries) else None
        place = {label: i for i, label in enumerate(layout.classes)}
        self._labels = torch.tensor([place[entry.label] for entry in entries if entry.label is not None])
        self.fingerprint = _fingerprint(layout.classes, entries, digests, form)
        self._cache: np.ndarray | None = None
        if pixels is not None and form.nbytes * len(entries) <= _ROOM:
            self._cache = np.empty((len(entries), *self.shape), dtype=form.dtype)
            for row in reversed(range(len(entries))):
                self._cache[row] = form.bring(pixels.pop())

    def __len__(self) -> int:
        return len(self._entries)

    def take(self, rows: Sequence[int]) -> tuple[Tensor, Cond | None]:
        """The images at these indices: float32 (B, C, H, W) in [-1, 1], and their labels as a Cond.

        Raises:
            BadArgument: an index outside [0, N).
            BadData: a file has become unreadable, or other than it was; the message names it.
        """
        found = check_rows(rows, len(self), self._store.path.name)
        pixels = np.empty((len(found), *self.shape), dtype=self.form.dtype)
        for i, row in enumerate(found):
            pixels[i] = self._load(row) if self._cache is None else self._cache[row]
        label = self._labels[found] if self.classes else None
        cond = Cond(label=label, vec=self._values[found] if self.attributes else None)
        return torch.from_numpy(self.form.floats(pixels)), cond if cond.present else None

    def _load(self, row: int) -> np.ndarray:
        file = self._entries[row].file
        try:
            return self.form.bring(decode(self._store.read(file), file)[1])
        except BadData as error:
            raise BadData(f"{self.name(row)}: {str(error).removeprefix(f'{file}: ')}") from error

    def name(self, row: int) -> str:
        """The file of an image."""
        return f"{self._store.path}/{self._entries[row].file}"


def divide(layout: Layout, split: str, holdout: float, path: Path) -> list[int]:
    """The places in `layout.entries` of the images of a split, ascending.

    Raises:
        BadArgument: holdout outside [0, 1), or given where the folder has its own split.
        BadData: the split is empty.
    """
    if not 0 <= holdout < 1:
        raise BadArgument(f"data holdout: got {holdout}, need a share in [0, 1)")
    entries = layout.entries
    if any(entry.split == "test" for entry in entries):
        if holdout != HOLDOUT:
            raise BadArgument(f"data holdout: got {holdout}, but {path} has test images of its own; leave it out")
        rows = [row for row, entry in enumerate(entries) if entry.split == split]
        cause = "all are in a folder test/; add a folder train/ beside it"
    else:
        held = _held_out([entry.key for entry in entries], holdout)
        rows = [row for row, entry in enumerate(entries) if (entry.key in held) == (split == "test")]
        cause = f"there are {len(entries)} images and holdout={holdout}; try more of them, or a folder test/"
    if not rows:
        raise BadData(f"{path}: no images for the {split} split: {cause}")
    return rows


def _held_out(keys: Sequence[str], share: float) -> set[str]:
    """The keys whose hash is below the share; at least one, and at least one is left, if there are two."""
    if share == 0 or len(keys) < 2:
        return set()
    place = {key: int(_sha(_bytes(key))[:16], 16) / 2**64 for key in keys}
    below = sum(place[key] < share for key in keys)
    return set(sorted(keys, key=lambda key: (place[key], key))[: min(max(below, 1), len(keys) - 1)])


class _Scan(NamedTuple):
    """One pass over the files: headers of all; of the split's own also hashes, and pixels if they fit in memory."""

    headers: list[Header]
    digests: list[str]
    pixels: list[np.ndarray] | None
    problems: list[Problem]


def _scan(store: Store, entries: Sequence[Entry], rows: set[int], wish: Wish, room: int) -> _Scan:
    headers, digests, problems = [], [], list(store.refused)
    pixels: list[np.ndarray] | None = []
    for row, entry in enumerate(entries):
        try:
            data = store.read(entry.file)
            if pixels is not None and room <= 0:
                pixels = None
            if pixels is None or row not in rows:
                headers.append(inspect(data, entry.file))
                digests += [_sha(data)] if row in rows else []
                continue
            header, decoded = decode(data, entry.file)
            headers.append(header)
            digests.append(_sha(data))
            if wish.size is not None and wish.resize != "none":
                decoded = resized(decoded, wish.size, wish.resize, raw=header.raw)
            pixels.append(decoded)
            room -= decoded.nbytes
        except BadData as error:
            problems.append(Problem(entry.file, str(error).removeprefix(f"{entry.file}: ")))
    return _Scan(headers, digests, pixels, problems)


def _unreadable(path: Path, problems: Sequence[Problem], total: int) -> str:
    named = ", ".join(f"{problem.file} ({problem.reason})" for problem in problems[:3])
    more = ", …" if len(problems) > 3 else ""
    return (
        f"{path}: {len(problems)} of {total} images cannot be read: {named}{more}; remove or mend them; "
        f"all are listed by: inkdrop data check {path}"
    )


def _fingerprint(classes: Sequence[str], entries: Sequence[Entry], digests: Sequence[str], form: Form) -> str:
    """SHA-256 of the form, the class names, and of each image its name, label, caption and bytes."""
    total = hashlib.sha256(json.dumps(["pixels 1", form, classes]).encode())
    for entry, digest in zip(entries, digests, strict=True):
        values = [entry.values] if entry.values else []
        total.update(json.dumps([entry.key, entry.label, entry.text, digest, *values]).encode())
    return total.hexdigest()


def _bytes(name: str) -> bytes:
    return name.encode("utf-8", "surrogateescape")


def _sha(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
