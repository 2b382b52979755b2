"""Streams: parquet files, or a data set of the Hub, read forwards only: nothing is copied, indexed or downloaded whole.

A stream is a `core.dataset.Data` whose rows are its own order: row r is position r // L of lane r mod L, and rows go on
beyond `len` into the next epoch. A trainer takes the rows that `Stream.rows_of` names, in place of a permutation.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
from torch import Tensor

from inkdrop.core.cond import Cond
from inkdrop.core.dataset import Data
from inkdrop.data.arrays import check_split
from inkdrop.data.form import Wish
from inkdrop.data.images import Resize
from inkdrop.data.parquet import hub_digest, load_hub, parquet_files, signature
from inkdrop.data.parquet_columns import Columns, datasets_package
from inkdrop.data.parquet_flow import Flow
from inkdrop.data.parquet_lanes import Lane
from inkdrop.data.records import Captions, Records, batch_of
from inkdrop.errors import BadArgument, BadData

__all__ = ["Stream", "hub_stream", "parquet_stream"]


def parquet_stream(
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
    held: int = 1000,
    lanes: int = 1,
    window: int = 1000,
    seed: int = 0,
) -> Data:
    """Parquet files read forwards, shuffled in windows: nothing is copied; needs the extra [data].

    Args:
        split: "train" or "test".
        data: a .parquet file, or a folder of them.
        image: as in `parquet`.
        label: as in `parquet`; its distinct values are read first if it is no ClassLabel.
        caption: as in `parquet`.
        attributes: as in `parquet`.
        size: as in `shards`.
        resize: as in `shards`.
        channels: as in `shards`.
        background: as in `shards`.
        held: the first so many rows of the first file are the test split, and are kept in memory, encoded; ≥ 1.
        lanes: independent parts, each of every lanes-th file, ≥ 1; give a multiple of the number of ranks.
        window: rows of a lane that are shuffled together, ≥ 1; two windows a lane are kept in memory, encoded.
        seed: of the order of files and rows.

    Raises:
        BadArgument: an option outside its range, or more lanes than files.
        BadData: no such files, or they are damaged; no such column.
        MissingExtra: `datasets` is not installed.
    """
    check_split(split)
    path = Path(data).expanduser()
    files = parquet_files(path)
    package, digest = datasets_package(), signature(files)
    import pyarrow.parquet

    rows = package.IterableDataset.from_parquet([str(file) for file in files])
    count = sum(pyarrow.parquet.read_metadata(file).num_rows for file in files)

    def values(name: str) -> Iterator[Any]:
        for file in files:
            yield from pyarrow.parquet.read_table(file, columns=[name]).column(name).unique().to_pylist()

    columns = Columns(image, label, caption, tuple(attributes))
    wish = Wish.of(size, resize, channels, background)
    return _split(split, Flow(rows, columns, str(path), digest, held, values), wish, count, lanes, window, seed)


def hub_stream(
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
    held: int = 1000,
    lanes: int = 1,
    window: int = 1000,
    seed: int = 0,
    count: int | None = None,
) -> Data:
    """A data set of the Hugging Face Hub, read over the network while training; needs the extra [data].

    Args:
        split: "train" or "test".
        repo: its id, "user/name".
        config: its configuration, where it has several.
        part: which of its own splits is read.
        revision: a branch, tag or commit; name a commit, so that a run can be repeated.
        image: as in `parquet`.
        label: as in `parquet`; it must be a ClassLabel.
        caption: as in `parquet`.
        attributes: as in `parquet`.
        size: as in `shards`.
        resize: as in `shards`.
        channels: as in `shards`.
        background: as in `shards`.
        held: as in `parquet_stream`.
        lanes: as in `parquet_stream`.
        window: as in `parquet_stream`.
        seed: as in `parquet_stream`.
        count: rows in all, for data sets that do not say it.

    Raises:
        BadArgument: an option outside its range, or more lanes than files.
        BadData: it cannot be reached or is not there; its columns, classes or size are not known.
        MissingExtra: `datasets` is not installed.
    """
    check_split(split)
    rows = load_hub(repo, config, part, revision, streaming=True)
    known = getattr((rows.info.splits or {}).get(part), "num_examples", None)
    total = count or known
    if not total:
        raise BadData(f"hub data {repo}: does not say how many rows it has; give --set data.count=...")
    wish = Wish.of(size, resize, channels, background)
    flow = Flow(rows, Columns(image, label, caption, tuple(attributes)), repo, hub_digest(rows), held, None)
    return _split(split, flow, wish, total, lanes, window, seed)


def _split(split: str, flow: Flow, wish: Wish, count: int, lanes: int, window: int, seed: int) -> Data:
    for what, got in (("lanes", lanes), ("window", window)):
        if got < 1:
            raise BadArgument(f"stream {what}: got {got}, need at least 1")
    if lanes > flow.pieces:
        raise BadArgument(f"stream lanes: got {lanes}, but {flow.title} has {flow.pieces} files; need at most as many")
    if not 0 <= seed < 2**63:
        raise BadArgument(f"stream seed: got {seed}, need an integer in [0, 2^63)")
    test = Records(flow, "test", np.arange(len(flow)), wish)
    if split == "test":
        return test
    if count <= len(flow):
        raise BadData(f"{flow.title}: all {count} rows are held out; give a smaller held")
    return Stream(flow, test, wish, count - len(flow), lanes, window, seed)


class Stream:
    """The training split of a stream, a `core.dataset.Data` with an order and a state of its own.

    Attributes:
        texts: the captions of rows, or None if there are none; they cost as much as the rows.

    Args:
        flow: the rows.
        test: those that are held out; their form is that of all.
        wish: what the caller asked for.
        count: rows in an epoch.
        lanes: L.
        window: W.
        seed: of the order.
    """

    def __init__(self, flow: Flow, test: Records, wish: Wish, count: int, lanes: int, window: int, seed: int) -> None:
        self._flow, self._count, self.lanes, self._wish, self.form = flow, count, lanes, wish, test.form
        self.shape, self.classes, self.levels = test.shape, test.classes, test.levels
        self.attributes, self.source = test.attributes, test.source
        self.texts: Captions | None = Captions(count, self._text, endless=True) if flow.has_texts else None
        about = ["stream 1", test.fingerprint, count, lanes, window, seed]
        self.fingerprint = hashlib.sha256(json.dumps(about).encode()).hexdigest()
        pieces = [[partial(flow.piece, i) for i in range(lane, flow.pieces, lanes)] for lane in range(lanes)]
        self._lanes = [Lane(own, window, seed, lane, flow.title) for lane, own in enumerate(pieces)]

    def __len__(self) -> int:
        return self._count

    def rows_of(self, update: int, batch: int) -> list[int]:
        """The rows of one update, by their place in the global batch: place p is of lane p·L // batch.

        So a rank that makes places r·batch/R to (r + 1)·batch/R reads L/R lanes and no others, where R divides L, and
        a worker that makes a whole micro-batch shares its lanes with no other rank.

        Raises:
            BadArgument: a batch that is no multiple of the lanes.
        """
        if batch % self.lanes:
            raise BadArgument(f"train.batch: got {batch}, need a multiple of the stream's {self.lanes} lanes")
        each = batch // self.lanes
        return [(update * each + place % each) * self.lanes + place // each for place in range(batch)]

    def _at(self, row: int) -> Mapping[str, Any]:
        if row < 0:
            raise BadArgument(f"{self._flow.title} row: got {row}, need at least 0")
        return self._lanes[row % self.lanes].row(row // self.lanes)

    def take(self, rows: Sequence[int]) -> tuple[Tensor, Cond | None]:
        """The samples at these places of the order: float32 (B, C, H, W) in [-1, 1], and their conditions.

        Raises:
            BadArgument: a row below 0; rows beyond the length are of the next epoch.
            BadData: one cannot be read; the message names its lane and position.
        """
        found = [self._flow.reading.record(self._at(int(row)), self.name(int(row))) for row in rows]
        return batch_of(found, self.form, self._wish, lambda i: self.name(int(rows[i])))

    def name(self, row: int) -> str:
        """The stream, the lane and the position in it."""
        return f"{self._flow.title} lane {row % self.lanes} sample {row // self.lanes}"

    def _text(self, row: int) -> str | None:
        return self._flow.reading.text(self._at(row))

    def state(self, update: int, batch: int) -> list[dict[str, Any]]:
        """What makes the batches from an update on quick to reach, as plain JSON; to be saved beside a checkpoint.

        Without it the same batches come, after reading the stream from its beginning.
        """
        return [lane.state(update * batch // self.lanes) for lane in self._lanes]

    def merged(self, states: Sequence[Sequence[Mapping[str, Any]]]) -> list[Mapping[str, Any]]:
        """The state of several processes at one update: of each lane that of the one which has read it furthest."""
        return [max(lane, key=lambda known: known["window"]) for lane in zip(*states, strict=True)]

    def restore(self, state: Sequence[Mapping[str, Any]]) -> None:
        """Take up a state that `state` gave, of a stream with the same fingerprint.

        Raises:
            BadCheckpoint: it is no such state.
            BadArgument: it is of another number of lanes.
        """
        if len(state) != self.lanes:
            raise BadArgument(f"stream state: got {len(state)} lanes, need {self.lanes}")
        for lane, known in zip(self._lanes, state, strict=True):
            lane.restore(known)
