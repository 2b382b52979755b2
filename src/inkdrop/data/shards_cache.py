"""The cache of shard indexes: one a shard, known by its path, size, time of change and the fields that are read."""

from __future__ import annotations

import hashlib
import json
import os
import uuid
from pathlib import Path
from typing import Any

import numpy as np

from inkdrop.data.shards_index import Fields, Index, index_of
from inkdrop.errors import BadData

__all__ = ["indexed", "stamp_of"]


def stamp_of(stat: os.stat_result) -> tuple[int, int]:
    """What tells that a file has changed: its size and the time of its last change, in ns."""
    return stat.st_size, stat.st_mtime_ns


def indexed(shard: Path, fields: Fields, cache: Path) -> dict[str, Any]:
    """The index of a shard as the cache has it, made if it is not there or damaged.

    Returns:
        shard; members, the file that holds its rows; stamp; count; classes, unused and digest as in `Index`; texts,
        whether there are any; unlabelled, the first row without a label, or None.

    Raises:
        BadData: as `index_of`, or the cache cannot be written.
    """
    try:
        stamp = stamp_of(shard.stat())
    except OSError as error:
        raise BadData(f"{shard}: {error.strerror}") from error
    key = hashlib.sha256(json.dumps(["index 1", str(shard.resolve()), stamp, fields]).encode()).hexdigest()[:32]
    members, card = cache / f"{key}.members", cache / f"{key}.json"
    record = _card(members, card)
    if record is None:
        made = index_of(shard, fields)
        record = _record_of(made)
        try:
            cache.mkdir(parents=True, exist_ok=True)
            _write(members, made.members.tobytes())
            _write(card, json.dumps(record).encode())
        except OSError as error:
            reason = f"{cache}: {error.strerror}; set INKDROP_CACHE to another folder"
            raise BadData(f"{shard}: its index cannot be kept in {reason}") from error
    return {**record, "shard": shard, "members": members, "stamp": stamp}


def _record_of(made: Index) -> dict[str, Any]:
    """What of an index is kept as JSON."""
    without = np.flatnonzero(made.members["label"] < 0)
    return {
        "count": len(made.members),
        "classes": made.classes,
        "unused": made.unused,
        "texts": bool((made.members["text_size"] > 0).any()),
        "unlabelled": int(without[0]) if len(without) else None,
        "digest": made.digest,
        "sha256": hashlib.sha256(made.members.tobytes()).hexdigest(),
    }


def _card(members: Path, card: Path) -> dict[str, Any] | None:
    """What the cache holds of an index, or None where there is nothing, or something damaged."""
    try:
        record: dict[str, Any] = json.loads(card.read_bytes())
        with members.open("rb") as stream:
            actual = hashlib.file_digest(stream, "sha256").hexdigest()
        return record if record["sha256"] == actual else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _write(file: Path, data: bytes) -> None:
    """A file whole or not at all; what is written last wins, and is the same."""
    part = file.with_name(f".{file.name}.{uuid.uuid4().hex[:8]}.part")
    try:
        part.write_bytes(data)
        part.replace(file)
    finally:
        part.unlink(missing_ok=True)
