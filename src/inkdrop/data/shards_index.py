"""The index of a tar shard: where each sample's image and caption lie in it, and its label.

A sample is the members of one key: "a/0017.png", "a/0017.cls" and "a/0017.json" have the key "a/0017", which ends at
the first dot of the file's name (the WebDataset layout). Nothing is unpacked to disk, and no member is executed.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import tarfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import numpy as np

from inkdrop.data.images import is_image
from inkdrop.data.store import FILE_LIMIT, unsafe
from inkdrop.errors import BadData

__all__ = ["Fields", "Index", "index_of", "member_type", "read_part"]

_BLOCK = 512  # bytes; a tar is a row of blocks
_SIDE = 1 << 20  # bytes that a .cls, .txt or .json has at most


class Fields(NamedTuple):
    """Which fields of a sample's .json are read.

    Attributes:
        label: that of the class; None for the member .cls.
        caption: that of the caption; None for the member .txt.
        attributes: those of numbers.
    """

    label: str | None = None
    caption: str | None = None
    attributes: tuple[str, ...] = ()


class Index(NamedTuple):
    """What a shard holds.

    Attributes:
        members: one row a sample, of `member_type`, in the order of the images in the file.
        classes: the class names of this shard; a member's label counts in them.
        unused: keys without an image.
        digest: SHA-256 of every sample's name, place, label, caption's place and attributes.
    """

    members: np.ndarray
    classes: tuple[str, ...]
    unused: int
    digest: str


def member_type(attributes: int) -> np.dtype:
    """The type of a row of an index, 44 + 4·attributes bytes.

    head, at, size: where the image's header and its bytes begin, and how many; text, text_size: the same of what holds
    the caption, 0 for none; label: −1 for none; place: of SHA-256 of the key, the first 64 bits; values: attributes.
    """
    fields: list[Any] = [("head", "<i8"), ("at", "<i8"), ("size", "<i4"), ("text", "<i8"), ("text_size", "<i4")]
    return np.dtype([*fields, ("label", "<i4"), ("place", "<u8"), ("values", "<f4", (attributes,))])


class _Part(NamedTuple):
    """A member that belongs to a sample."""

    name: str
    head: int
    at: int
    size: int


def index_of(shard: Path, fields: Fields) -> Index:
    """The index of one shard. Cost: its headers are read, and those members that hold labels and attributes.

    Raises:
        BadData: not a tar, compressed, truncated or damaged; a link, or a name that leads outside; two images of one
            key; a label or an attribute that is missing or not what it should be. The shard and the member are named.
    """
    try:
        with shard.open("rb") as raw:
            samples: dict[str, dict[str, _Part]] = {}
            for part in _parts(shard, raw):
                key, kind = _key(part.name)
                if kind is None:
                    continue
                held = samples.setdefault(key, {})
                if kind in held:
                    both = "" if held[kind].name == part.name else f" beside {held[kind].name}"
                    raise BadData(f"{shard}: {part.name}{both}: two members of one kind for one key; keep one")
                held[kind] = part
            return _index(shard, raw.fileno(), samples, fields)
    except OSError as error:
        raise BadData(f"{shard}: {error.strerror or error}") from error


def _parts(shard: Path, raw: Any) -> Iterator[_Part]:
    """The regular members of a tar in their order, after which it must end as tars do."""
    end = os.fstat(raw.fileno()).st_size
    if raw.read(2) == b"\x1f\x8b":
        raise BadData(f"{shard}: compressed, so that no member can be found without the ones before; gunzip it first")
    raw.seek(0)
    try:
        with tarfile.open(fileobj=raw, mode="r:") as tar:
            kept: Any = tar
            while (member := tar.next()) is not None:
                kept.members.clear()  # it would keep them all
                if member.isdir() or _hidden(member.name):
                    continue
                reason = unsafe(member.name) or ("" if member.isreg() and not member.issparse() else "no plain file")
                if not reason and member.offset_data + member.size > end:
                    reason = f"cut off: it ends at byte {member.offset_data + member.size:,} of {end:,}"
                if reason:
                    raise BadData(f"{shard}: {member.name!r}: {reason}; make the shard again without it")
                yield _Part(PurePosixPath(member.name).as_posix(), member.offset, member.offset_data, member.size)
            tail = os.pread(raw.fileno(), _BLOCK, tar.offset)
    except (tarfile.TarError, ValueError, OverflowError, EOFError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise BadData(f"{shard}: not a whole tar ({reason}); make it or fetch it again") from error
    if any(tail) or len(tail) < _BLOCK:
        cause = f"a damaged header at byte {tar.offset:,}" if any(tail) else "cut off: its end mark is missing"
        raise BadData(f"{shard}: not a whole tar ({cause}); make it or fetch it again")


def _hidden(name: str) -> bool:
    return any(part.startswith(".") and part not in (".", "..") for part in PurePosixPath(name).parts)


def _key(name: str) -> tuple[str, str | None]:
    """The key of a member's name, and what it is of the sample: "image", "cls", "txt", "json", or None."""
    folder, slash, base = name.rpartition("/")
    stem, _, kind = base.partition(".")
    kind = kind.lower()
    known = "image" if is_image(f".{kind}") and "." not in kind else kind if kind in ("cls", "txt", "json") else None
    return f"{folder}{slash}{stem}", known


def _index(shard: Path, handle: int, samples: dict[str, dict[str, _Part]], fields: Fields) -> Index:
    """The index of the samples that have an image."""
    whole = {key: held for key, held in samples.items() if "image" in held}
    members = np.zeros(len(whole), dtype=member_type(len(fields.attributes)))
    classes: dict[str, int] = {}
    total = hashlib.sha256()
    for row, (key, held) in enumerate(whole.items()):
        image, text = held["image"], held.get("txt" if fields.caption is None else "json")
        if image.size > FILE_LIMIT:
            raise BadData(f"{shard}: {image.name}: larger than {FILE_LIMIT >> 20} MiB")
        label, values = _told(shard, handle, held, fields)
        number = -1 if label is None else classes.setdefault(label, len(classes))
        place = int.from_bytes(hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()[:8], "big")
        where = (0, 0) if text is None else (text.at, text.size)
        members[row] = (image.head, image.at, image.size, *where, number, place, values)
        about = [image.name, image.at, image.size, label, where, values]
        total.update(json.dumps(about).encode())
    return Index(members, tuple(classes), len(samples) - len(whole), total.hexdigest())


def _told(shard: Path, handle: int, held: dict[str, _Part], fields: Fields) -> tuple[str | None, tuple[float, ...]]:
    """The label and the attributes of a sample."""
    record: dict[str, Any] = {}
    if fields.label is not None or fields.attributes:
        if "json" not in held:
            raise BadData(f"{shard}: {held['image'].name}: has no .json beside it, which is to hold its fields")
        record = _json(read_part(shard, handle, held["json"].name, held["json"].at, held["json"].size), shard, held)
    label: Any = None
    if fields.label is not None:
        label = _field(record, fields.label, shard, held)
    elif "cls" in held:
        part = held["cls"]
        label = read_part(shard, handle, part.name, part.at, part.size).decode("utf-8", "replace").strip()
    if label is not None and (isinstance(label, bool) or not isinstance(label, str | int) or label == ""):
        raise BadData(f"{shard}: {held['image'].name}: got the label {label!r}, need a string or a whole number")
    values = tuple(_number(_field(record, name, shard, held), name, shard, held) for name in fields.attributes)
    return None if label is None else str(label), values


def read_part(shard: Path, handle: int, name: str, at: int, size: int) -> bytes:
    """The bytes of a small member.

    Raises:
        BadData: it is larger than 1 MiB, or the file has become shorter.
    """
    if size > _SIDE:
        raise BadData(f"{shard}: {name}: {size:,} bytes of text, need at most {_SIDE:,}")
    data = os.pread(handle, size, at)
    if len(data) != size:
        raise BadData(f"{shard}: {name}: cut off")
    return data


def _json(data: bytes, shard: Path, held: dict[str, _Part]) -> dict[str, Any]:
    try:
        record = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise BadData(f"{shard}: {held['json'].name}: not JSON ({error})") from error
    if not isinstance(record, dict):
        raise BadData(f"{shard}: {held['json'].name}: got {type(record).__name__}, need an object")
    return record


def _field(record: dict[str, Any], name: str, shard: Path, held: dict[str, _Part]) -> Any:
    if name not in record:
        known = ", ".join(sorted(record)[:8]) or "none"
        raise BadData(f"{shard}: {held['json'].name}: no field {name!r}; there are {known}")
    return record[name]


def _number(value: Any, name: str, shard: Path, held: dict[str, _Part]) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or abs(value) > 3e38:
        raise BadData(f"{shard}: {held['json'].name}: got {value!r} for {name}, need a finite number")
    return float(value)
