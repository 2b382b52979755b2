"""Latents: those of a whole data set, encoded once and mapped from disk.

$INKDROP_CACHE/latents-KEY/
latents.npy         float32 (N, c, h, w): the posterior's means, in the codec's unit
label.npy           int64 (N,), where there are classes
vec.npy             float32 (N, D), where there are attributes
latents.json        of what they are, and the sha256 of each
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from inkdrop.codec import Codec, chunk, encoded
from inkdrop.core.cond import Cond
from inkdrop.core.dataset import Data, Forward
from inkdrop.data.fetch import cache_folder
from inkdrop.errors import BadArgument, BadData, BadShape
from inkdrop.files import remove_folder, sha256, write_folder, write_json

__all__ = ["Latents"]

_CARD = "latents.json"


class Latents:
    """A `core.dataset.Data` of the latents of images, encoded once and mapped from disk: memory holds none of them.

    Samples are the means of the posterior in the codec's unit (each channel of about mean 0 and deviation 1), not
    confined to [-1, 1]; conditions, names and captions are the images' own, and no image is read again for them. The
    cache is the folder latents-KEY in $INKDROP_CACHE or ~/.cache/inkdrop, or in `cache`; KEY hashes the images, their
    preprocessing, the codec's weights and the kind of number. A damaged entry is made again.

    Args:
        data: images of the codec's shape.
        codec: in evaluation mode, on any device.
        cache: where to keep them; None for the house's cache.

    Raises:
        BadShape: images of another shape.
        BadArgument: a stream, or a cache that cannot be written.
        BadData: latents that are not finite.
    """

    def __init__(self, data: Data, codec: Codec, cache: Path | None = None) -> None:
        check_images(data, codec)
        if isinstance(data, Forward):
            raise BadArgument("train.cache: got a stream, which is too long to be kept; use train.cache=false")
        self._data = data
        self.shape: tuple[int, ...] = codec.latent_shape
        self.classes = data.classes
        self.levels: int | None = None
        self.source = f"latents of {data.source}"
        self.texts: Sequence[str | None] | None = getattr(data, "texts", None)
        about = {"data": data.fingerprint, "codec": codec.hash, "dtype": "float32", "what": "means 2"}
        self.fingerprint = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()
        name = f"latents-{self.fingerprint[:16]}"
        folder = cache_folder(name) if cache is None else Path(cache) / name
        shape = (len(data), *self.shape)
        found = _read(folder, shape)
        self._kept: Mapping[str, np.ndarray] = _made(folder, data, codec, about) if found is None else found

    def __len__(self) -> int:
        return len(self._data)

    def take(self, rows: Sequence[int]) -> tuple[Tensor, Cond | None]:
        """The latents at these indices, float32 (B, c, h, w), and their images' conditions.

        Raises:
            BadArgument: an index outside [0, N).
        """
        if any(not 0 <= row < len(self) for row in rows):
            raise BadArgument(f"latents: got rows {min(rows)} to {max(rows)}, need 0 to {len(self) - 1}")
        at = np.asarray(rows, np.int64)
        picked = {name: torch.from_numpy(np.array(kept[at])) for name, kept in self._kept.items()}
        z = picked.pop("latents")
        return z, Cond(label=picked.get("label"), vec=picked.get("vec")) if picked else None

    def name(self, row: int) -> str:
        """The name of the image."""
        return self._data.name(row)


def check_images(data: Data, codec: Codec) -> None:
    """Refuse images that are not of the codec's shape.

    Raises:
        BadShape: they are not.
    """
    if tuple(data.shape) != codec.shape:
        raise BadShape(
            f"latents: got images of {tuple(data.shape)}, but the autoencoder takes {codec.shape}"
            f"{_remedy(tuple(data.shape), codec.shape)}"
        )


def _remedy(got: tuple[int, ...], need: tuple[int, ...]) -> str:
    """How a folder's images of shape `got` are brought to the shape that is needed; "" where that is not known."""
    channels = {1: "grey", 3: "rgb", 4: "rgba"}.get(need[0])
    if len(got) != 3 or (got[0] != need[0] and channels is None):
        return ""
    size = str(need[1]) if need[1] == need[2] else f"{need[1]},{need[2]}"
    settings = [] if got[0] == need[0] else [f"data.channels={channels}"]
    settings += [] if got[1:] == need[1:] else [f"data.size={size}", "data.resize=stretch"]
    return f"; of a folder try {' '.join(f'--set {text}' for text in settings)}"


def _made(folder: Path, data: Data, codec: Codec, about: dict[str, str]) -> Mapping[str, np.ndarray]:
    """What the folder holds once every image is encoded and written into it, chunk by chunk."""
    if folder.exists():
        remove_folder(folder)

    def write(card: Path) -> None:
        _encode(card.parent, data, codec)
        files = sorted(card.parent.glob("*.npy"))
        write_json(card, {**about, "samples": len(data), "sha256": {file.name: sha256(file) for file in files}})

    try:
        write_folder(folder, {_CARD: write})
    except BadArgument:
        if _read(folder, (len(data), *codec.latent_shape)) is None:  # else another process put it there meanwhile
            raise
    found = _read(folder, (len(data), *codec.latent_shape))
    if found is None:
        raise BadData(f"{folder}: what was just written cannot be read; look at the disk")
    return found


def _encode(folder: Path, data: Data, codec: Codec) -> None:
    """Write the latents of all images, and what they are told with."""
    files: dict[str, np.memmap] = {}
    step = chunk(data.shape)
    for first in range(0, len(data), step):
        x, cond = data.take(range(first, min(first + step, len(data))))
        values = {"latents": encoded(codec, x), **_told(cond)}
        if not bool(values["latents"].isfinite().all()):
            raise BadData(
                f"latents: the autoencoder gives numbers that are not finite for {data.source}; train it again"
            )
        for name, value in values.items():
            if name not in files:
                shape = (len(data), *value.shape[1:])
                files[name] = np.lib.format.open_memmap(
                    folder / f"{name}.npy", mode="w+", dtype=value.numpy().dtype, shape=shape
                )
            files[name][first : first + len(x)] = value.numpy()
    for file in files.values():
        file.flush()


def _told(cond: Cond | None) -> dict[str, Tensor]:
    """The fields of a condition that data have of their own: classes and attributes."""
    if cond is None:
        return {}
    if other := set(cond.told) - {"label", "vec"}:
        raise BadData(f"latents: got data that tell {', '.join(sorted(other))}, need label and vec alone")
    return {name: value for name in ("label", "vec") if (value := getattr(cond, name)) is not None}


def _read(folder: Path, shape: tuple[int, ...]) -> Mapping[str, np.ndarray] | None:
    """What a cache's folder maps, or None where there is nothing, or something damaged."""
    try:
        sums: dict[str, Any] = json.loads((folder / _CARD).read_text(encoding="utf-8"))["sha256"]
        if any(sha256(folder / name) != known for name, known in sums.items()):
            return None
        kept = {Path(name).stem: np.load(folder / name, mmap_mode="r", allow_pickle=False) for name in sums}
        z = kept["latents"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return kept if z.shape == shape and z.dtype == np.float32 else None
