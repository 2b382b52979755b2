"""Parquet: tables of images, as Hugging Face `datasets` keeps them, read at random through a memory map."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from inkdrop.data.arrays import check_split
from inkdrop.data.fetch import cache_folder
from inkdrop.data.folder import HOLDOUT
from inkdrop.data.form import Wish
from inkdrop.data.images import Resize
from inkdrop.data.parquet_columns import Columns, Reading, columns_of, datasets_package
from inkdrop.data.records import Record, Records, held_out
from inkdrop.data.store import natural
from inkdrop.errors import BadData

__all__ = ["Table", "hub", "hub_digest", "load_hub", "mixed", "parquet", "parquet_files", "signature"]

_BLOCK = 1 << 20


def parquet(
    split: str,
    *,
    data: Path,
    image: str | None = None,
    label: str | None = None,
    caption: str | None = None,
    attributes: tuple[str, ...] = (),
    size: int | tuple[int, int] | None = None,
    resize: Resize = "none",
    channels: Literal["auto", "grey", "rgb", "rgba"] = "auto",
    background: Literal["white", "black"] = "white",
    holdout: float = HOLDOUT,
) -> Records:
    """A parquet file, or a folder of them, with encoded images in a column; needs the extra [data].

    The first use writes the same rows as Arrow files into $INKDROP_CACHE (or ~/.cache/inkdrop), which are as large as
    the images in them; after that any row is one look into a memory map. A row is held out where a hash of its number
    is below `holdout`.

    Args:
        split: "train" or "test".
        data: a .parquet file, or a folder of them, taken in natural order.
        image: the column of images; by default the first of the type Image, or one named image, img, jpg, png or webp.
        label: the column of classes; by default label, class or category, if there is one.
        caption: the column of captions; by default text or caption, if there is one.
        attributes: columns of numbers, which become continuous attributes as they are.
        size: as in `shards`.
        resize: as in `shards`.
        channels: as in `shards`.
        background: as in `shards`.
        holdout: the share held out, in [0, 1); 0 holds none out.

    Raises:
        BadArgument: an option outside its range, or one that has no effect.
        BadData: no such files, or they are damaged; no such column; mixed sizes; or the split is empty.
        MissingExtra: `datasets` is not installed.
    """
    check_split(split)
    wish = Wish.of(size, resize, channels, background)
    path = Path(data).expanduser()
    files = parquet_files(path)
    package, digest = datasets_package(), signature(files)
    try:
        rows = package.Dataset.from_parquet(
            [str(file) for file in files], cache_dir=str(cache_folder("parquet") / digest[:16])
        )
    except Exception as error:  # `datasets` and Arrow raise nearly anything on a damaged file
        raise BadData(f"{path}: cannot be read as parquet ({_line(error)})") from error
    table = Table(rows, Columns(image, label, caption, tuple(attributes)), str(path), "parquet", digest)
    return Records(table, split, held_out(table, holdout), wish)


def hub(
    split: str,
    *,
    repo: str,
    config: str | None = None,
    part: str = "train",
    revision: str | None = None,
    image: str | None = None,
    label: str | None = None,
    caption: str | None = None,
    attributes: tuple[str, ...] = (),
    size: int | tuple[int, int] | None = None,
    resize: Resize = "none",
    channels: Literal["auto", "grey", "rgb", "rgba"] = "auto",
    background: Literal["white", "black"] = "white",
    holdout: float = HOLDOUT,
) -> Records:
    """A data set of the Hugging Face Hub by its id, downloaded whole by `datasets`; needs the extra [data].

    The download is made because you name it here, and is kept where `datasets` keeps it ($HF_HOME). No code of the
    repository is run.

    Args:
        split: "train" or "test".
        repo: its id, "user/name".
        config: its configuration, where it has several.
        part: which of its own splits is read; `holdout` of it is our test split.
        revision: a branch, tag or commit; by default the newest.
        image: as in `parquet`.
        label: as in `parquet`.
        caption: as in `parquet`.
        attributes: as in `parquet`.
        size: as in `shards`.
        resize: as in `shards`.
        channels: as in `shards`.
        background: as in `shards`.
        holdout: the share held out, in [0, 1); 0 holds none out.

    Raises:
        BadArgument: an option outside its range, or one that has no effect.
        BadData: it cannot be reached or is not there; otherwise as `parquet`.
        MissingExtra: `datasets` is not installed.
    """
    check_split(split)
    wish = Wish.of(size, resize, channels, background)
    rows = load_hub(repo, config, part, revision, streaming=False)
    table = Table(rows, Columns(image, label, caption, tuple(attributes)), repo, f"{part} on the Hub", hub_digest(rows))
    return Records(table, split, held_out(table, holdout), wish)


def load_hub(repo: str, config: str | None, part: str, revision: str | None, *, streaming: bool) -> Any:
    """What `datasets` makes of an id on the Hub.

    Raises:
        BadData: it cannot be reached or is not there.
    """
    package = datasets_package()
    try:
        return package.load_dataset(repo, config, split=part, revision=revision, streaming=streaming)
    except Exception as error:  # whatever the network and the repository do
        raise BadData(
            f"hub data {repo}: cannot be had ({_line(error)}); if there is no network, download its parquet files "
            "elsewhere, then: --set data=parquet --set data.data=FOLDER"
        ) from error


def hub_digest(rows: Any) -> str:
    """A hash of what the Hub says of a data set: its files with their revision, its size and its columns."""
    info = rows.info
    about = [sorted(info.download_checksums or {}), repr(info.splits), repr(rows.features), str(info.version)]
    return hashlib.sha256(json.dumps(about).encode()).hexdigest()


def parquet_files(path: Path) -> list[Path]:
    """The parquet files of a folder in natural order, or the one that is named.

    Raises:
        BadData: there are none.
    """
    if path.is_file():
        return [path]
    try:
        found = sorted((file for file in path.glob("*.parquet") if file.is_file()), key=lambda p: natural(p.name))
        others = sorted({file.suffix or "no suffix" for file in path.iterdir()})
    except OSError as error:
        raise BadData(f"{path}: {error.strerror}; give the folder that holds the parquet files") from error
    if not found:
        raise BadData(f"{path}: no *.parquet, found {', '.join(others[:6]) or 'nothing'}")
    return found


def signature(files: Sequence[Path]) -> str:
    """SHA-256 of each file's name, size and footer, which holds the place, size and statistics of every column chunk.

    Raises:
        BadData: a file is no parquet, or cut off.
    """
    total = hashlib.sha256(b"parquet 1")
    for file in files:
        try:
            with file.open("rb") as stream:
                end = stream.seek(0, 2)
                stream.seek(max(0, end - 8))
                tail = stream.read()
                length = int.from_bytes(tail[:4], "little")
                if len(tail) < 8 or tail[4:] != b"PAR1" or length + 12 > end:
                    raise BadData(f"{file}: not a whole parquet file; make it or fetch it again")
                stream.seek(end - 8 - length)
                total.update(json.dumps([file.name, end]).encode() + stream.read(length))
        except OSError as error:
            raise BadData(f"{file}: {error.strerror or error}") from error
    return total.hexdigest()


def _line(error: Exception) -> str:
    cause = error.__cause__ or error
    return " ".join(f"{type(cause).__name__}: {cause}".split())[:200]


class Table:
    """A `Source` of the rows of a memory-mapped `datasets.Dataset`; see `records.Source` for attributes and methods.

    Args:
        rows: the data set.
        columns: which are asked for.
        title: what to call it in messages.
        kind: what it is, for people.
        digest: a hash of its content.

    Raises:
        BadData: a column is not there, or not what it should be.
    """

    def __init__(self, rows: Any, columns: Columns, title: str, kind: str, digest: str) -> None:
        found = columns_of(rows.features, columns, title)
        self._count = len(rows)
        named = not found.label or hasattr(rows.features[found.label], "names")
        labels = None if named else rows.data.column(found.label).unique().to_pylist()
        self._reading = Reading(rows.features, found, labels, title)
        self._cells = {name: rows.data.column(name) for name in found.read}
        self.title, self.kind, self.classes = title, f"{kind}, {self._count:,} rows", self._reading.classes
        self.attributes, self.has_texts = found.attributes, bool(found.caption)
        self.digest = hashlib.sha256(json.dumps([digest, found]).encode()).hexdigest()

    def __len__(self) -> int:
        return self._count

    def _row(self, number: int, columns: Sequence[str]) -> Mapping[str, Any]:
        return {name: self._cells[name][number].as_py() for name in columns}

    def records(self, numbers: Sequence[int]) -> list[Record]:
        """The rows of these numbers."""
        columns = self._reading.columns
        names = [name for name in columns.read if name != columns.caption]
        return [self._reading.record(self._row(number, names), self.name(number)) for number in numbers]

    def text(self, number: int) -> str | None:
        """The caption of a row."""
        caption = self._reading.columns.caption
        return self._reading.text(self._row(number, [caption])) if caption else None

    def name(self, number: int) -> str:
        """The table and the row's number, from 0."""
        return f"{self.title} row {number}"

    def places(self) -> Iterator[np.ndarray]:
        """A hash of each row's number: the mixing function of splitmix64."""
        for first in range(0, self._count, _BLOCK):
            yield mixed(np.arange(first, min(first + _BLOCK, self._count), dtype=np.uint64))


def mixed(numbers: np.ndarray) -> np.ndarray:
    """Each uint64 as another, one to one, spread evenly over [0, 2^64).

    Reference: Steele, Lea, Flood 2014, "Fast splittable pseudorandom number generators", section 2 (the finaliser).
    """
    z = (numbers + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    out: np.ndarray = z ^ (z >> np.uint64(31))
    return out
