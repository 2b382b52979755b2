"""Shards: images in tar files of the WebDataset layout, read in place and at random; nothing is unpacked."""

from __future__ import annotations

import hashlib
import io
import json
import os
import tarfile
import threading
import weakref
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from inkdrop.data.arrays import check_split
from inkdrop.data.fetch import cache_folder
from inkdrop.data.folder import HOLDOUT
from inkdrop.data.form import Wish
from inkdrop.data.images import Resize
from inkdrop.data.records import PROBED, Record, Records, held_out
from inkdrop.data.shards_cache import indexed, stamp_of
from inkdrop.data.shards_index import Fields, member_type, read_part
from inkdrop.data.store import natural
from inkdrop.errors import BadData

__all__ = ["Tars", "shards"]

_OPEN = 128  # shards that are open at once, at most


def shards(
    split: str,
    *,
    data: Path,
    size: int | tuple[int, int] | None = None,
    resize: Resize = "none",
    channels: Literal["auto", "grey", "rgb", "rgba"] = "auto",
    background: Literal["white", "black"] = "white",
    label: str | None = None,
    caption: str | None = None,
    attributes: tuple[str, ...] = (),
    holdout: float = HOLDOUT,
) -> Records:
    """Tar shards in the WebDataset layout: key.png (.jpg, .webp, ...) with key.cls, key.txt, key.json beside it.

    The first use reads every header once and keeps an index of about 44 bytes a sample in $INKDROP_CACHE (or
    ~/.cache/inkdrop); after that any sample is one read. A shard whose size or time of change is another is indexed
    again. A sample is held out where SHA-256 of its key, as a number in [0, 1), is below `holdout`, whichever shard it
    is in. Size and channels are inferred from 64 images, evenly spaced; one that differs is refused when it is taken.

    Args:
        split: "train" or "test".
        data: a folder of *.tar files, or one of them; they are taken in natural order.
        size: height and width in pixels, or (height, width); by default that of the images.
        resize: what to do with images of another size: "none" refuses them, "crop" scales the short side and cuts the
            middle out, "stretch" scales both sides.
        channels: "auto" is grey if the 64 images are, keeps alpha if they all have one, and is RGB otherwise.
        background: what an alpha that is not kept is laid over.
        label: the field of .json that holds the class; by default the member .cls holds it.
        caption: the field of .json that holds the caption; by default the member .txt is the caption.
        attributes: fields of .json that hold numbers, which become continuous attributes as they are.
        holdout: the share held out, in [0, 1); 0 holds none out.

    Raises:
        BadArgument: an option outside its range, or one that has no effect.
        BadData: no shards or no images, a shard that is damaged or unsafe, mixed sizes; or the split is empty.
    """
    check_split(split)
    wish = Wish.of(size, resize, channels, background)
    source = Tars(Path(data).expanduser(), Fields(label, caption, tuple(attributes)))
    return Records(source, split, held_out(source, holdout), wish)


class _Entry(NamedTuple):
    """A shard and its index in the cache."""

    path: Path
    members: Path
    stamp: tuple[int, int]
    size: int
    labels: np.ndarray  # the label of its own counting -> that of all shards


class _Open:
    """A shard that is open; it is closed when the last thread that reads it lets it go."""

    def __init__(self, entry: _Entry, members: np.dtype) -> None:
        self.entry = entry
        self.handle = os.open(entry.path, os.O_RDONLY)
        weakref.finalize(self, os.close, self.handle)
        if stamp_of(os.fstat(self.handle)) != entry.stamp:
            raise BadData(f"{entry.path}: has changed since it was indexed; start again")
        self.members = np.memmap(entry.members, members, "r", shape=(entry.size,))


class Tars:
    """A `Source` of tar shards; see `records.Source` for its attributes and methods.

    Args:
        path: the folder, or one shard.
        fields: what is read of .json members.
        cache: where indexes are kept; None for the house's cache.

    Raises:
        BadData: as `shards`.
    """

    def __init__(self, path: Path, fields: Fields, cache: Path | None = None) -> None:
        self.title, self._fields = str(path), fields
        self.attributes = fields.attributes
        self._type = member_type(len(fields.attributes))
        cache = cache_folder("shards") if cache is None else cache
        found = [indexed(shard, fields, cache) for shard in _shards(path)]
        names = {name for card in found for name in card["classes"]}
        self.classes: tuple[str, ...] = tuple(sorted(names, key=natural))
        number = {name: i for i, name in enumerate(self.classes)}
        self._entries = [
            _Entry(
                c["shard"], c["members"], c["stamp"], c["count"], np.array([number[n] for n in c["classes"]], np.int64)
            )
            for c in found
            if c["count"]
        ]
        self._ends = np.cumsum([entry.size for entry in self._entries], dtype=np.int64)
        self._open: OrderedDict[int, _Open] = OrderedDict()
        self._lock = threading.Lock()
        unused = sum(card["unused"] for card in found)
        self.kind = f"{len(found)} tar shards" + (f"; {unused} keys without an image left out" if unused else "")
        if not len(self):
            raise BadData(f"{path}: no images in {self.kind}; need key.png, key.jpg or key.webp in each")
        self.has_texts = any(card["texts"] for card in found)
        self._check_labels([card for card in found if card["count"]])
        about = [[card["shard"].name, card["digest"]] for card in found]
        if fields.caption is not None and not any(self.text(i) for i in range(min(len(self), PROBED))):
            raise BadData(f"{path}: no text in the field {fields.caption!r} of the first .json members; name another")
        self.digest = hashlib.sha256(json.dumps([fields, about]).encode()).hexdigest()

    def _check_labels(self, cards: Sequence[dict[str, Any]]) -> None:
        """Refuse labels that some samples have and others lack."""
        for first, card in zip(self._ends - [card["count"] for card in cards], cards, strict=True):
            if self.classes and card["unlabelled"] is not None:
                raise BadData(f"{self.name(int(first) + card['unlabelled'])}: no label, though others have one")

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def _at(self, number: int) -> tuple[_Open, int]:
        """The shard of a sample, open, and the sample's row in its index."""
        shard = int(np.searchsorted(self._ends, number, side="right"))
        row = number - (int(self._ends[shard - 1]) if shard else 0)
        with self._lock:
            found = self._open.get(shard)
            if found is None:
                try:
                    found = self._open[shard] = _Open(self._entries[shard], self._type)
                except OSError as error:
                    raise BadData(f"{self._entries[shard].path}: {error.strerror or error}") from error
            self._open.move_to_end(shard)
            if len(self._open) > _OPEN:
                self._open.popitem(last=False)
        return found, row

    def records(self, numbers: Sequence[int]) -> list[Record]:
        """The samples of these numbers: one read each."""
        return [self._record(number) for number in numbers]

    def _record(self, number: int) -> Record:
        shard, row = self._at(number)
        member = shard.members[row]
        size = int(member["size"])
        try:
            image = os.pread(shard.handle, size, int(member["at"]))
        except OSError as error:
            raise BadData(f"{self.name(number)}: {error.strerror or error}") from error
        if len(image) != size:
            raise BadData(f"{self.name(number)}: cut off; the shard has changed, start again")
        label = int(shard.entry.labels[member["label"]]) if self.classes else None
        return Record(image, label, tuple(member["values"].tolist()))

    def text(self, number: int) -> str | None:
        """The caption of a sample: its .txt, or a field of its .json."""
        shard, row = self._at(number)
        member = shard.members[row]
        if not member["text_size"]:
            return None
        name = self.name(number)
        data = read_part(shard.entry.path, shard.handle, name, int(member["text"]), int(member["text_size"]))
        try:
            text: Any = data.decode("utf-8")
            if self._fields.caption is not None:
                record = json.loads(text)
                text = record.get(self._fields.caption) if isinstance(record, dict) else None
        except (ValueError, RecursionError) as error:
            raise BadData(f"{name}: its caption cannot be read ({error})") from error
        if not isinstance(text, str | None):
            raise BadData(f"{name}: got the caption {text!r}, need a string")
        return (text or "").strip() or None

    def name(self, number: int) -> str:
        """The shard and, in it, the image: "photos/0003.tar/cat/17.png"; read from the tar."""
        shard, row = self._at(number)
        head, at = int(shard.members["head"][row]), int(shard.members["at"][row])
        try:
            with tarfile.open(fileobj=io.BytesIO(os.pread(shard.handle, at - head, head)), mode="r:") as tar:
                found = tar.next()
        except (OSError, tarfile.TarError, ValueError):
            found = None
        return f"{shard.entry.path}/{f'byte {at}' if found is None else found.name}"

    def places(self) -> Iterator[np.ndarray]:
        """The hash of each sample's key, a shard at a time."""
        for entry in self._entries:
            yield np.array(np.memmap(entry.members, self._type, "r", shape=(entry.size,))["place"])


def _shards(path: Path) -> list[Path]:
    """The tar files of a folder in natural order, or the one that is named."""
    if path.is_file():
        return [path]
    try:
        found = sorted((shard for shard in path.glob("*.tar") if shard.is_file()), key=lambda p: natural(p.name))
        others = sorted({file.suffix or "no suffix" for file in path.iterdir() if not file.name.startswith(".")})
    except OSError as error:
        raise BadData(f"{path}: {error.strerror}; give the folder that holds the shards") from error
    found = [shard for shard in found if not shard.name.startswith(".")]
    if not found:
        raise BadData(f"{path}: no shards (*.tar), found {', '.join(others[:6]) or 'nothing'}")
    return found
