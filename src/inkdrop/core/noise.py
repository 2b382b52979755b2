"""Noise keyed by (seed, image, draw): the same for an image at any batch size, on any rank, alone or in a server.

NumPy's Philox counter-based generator is the reference: key = (seed, image), the top word of the counter = draw.
Numbers are drawn in float64 on the CPU and then cast, so float32 and float64 runs see the same noise.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from inkdrop.core.level import Level
from inkdrop.errors import BadArgument, BadShape

__all__ = ["Draw", "Keyed", "generator", "normal"]

_WORD = 2**64


def _check_key(what: str, key: int) -> None:
    if not 0 <= key < _WORD:
        raise BadArgument(f"{what}: got {key}, need an integer in [0, 2^64)")


def generator(seed: int, image: int, draw: int) -> np.random.Generator:
    """The counter-based generator of (seed, image, draw), each in [0, 2^64).

    Raises:
        BadArgument: a key outside its range.
    """
    for what, key in (("seed", seed), ("image", image), ("draw", draw)):
        _check_key(what, key)
    words = np.array([0, 0, 0, draw], dtype=np.uint64)
    return np.random.Generator(np.random.Philox(key=np.array([seed, image], dtype=np.uint64), counter=words))


class _Rekeyed:
    """One generator moved from key to key: the same numbers as `generator`, a sixth of the time to make one."""

    def __init__(self) -> None:
        self._bits = np.random.Philox(key=0)
        self._generator = np.random.Generator(self._bits)

    def at(self, seed: int, image: int, draw: int) -> np.random.Generator:
        """The generator of (seed, image, draw), valid until the next call."""
        self._bits.state = {
            "bit_generator": "Philox",
            "state": {"counter": np.array([0, 0, 0, draw], np.uint64), "key": np.array([seed, image], np.uint64)},
            "buffer": np.zeros(4, np.uint64),
            "buffer_pos": 4,
            "has_uint32": 0,
            "uinteger": 0,
        }
        return self._generator


_threads = threading.local()


def _source() -> _Rekeyed:
    """This thread's generator, which is re-keyed at each use: making one costs more than a draw."""
    if not hasattr(_threads, "source"):
        _threads.source = _Rekeyed()
    source: _Rekeyed = _threads.source
    return source


def normal(shape: Sequence[int], seed: int, images: Sequence[int], draw: int) -> Tensor:
    """Unit normal noise of the shape (B, ...), row i keyed by (seed, images[i], draw); float64 on the CPU."""
    if len(images) != shape[0]:
        raise BadShape(f"noise: got {len(images)} images for {shape[0]} rows; give one image index a row")
    ends = (("image", max(images, default=0)), ("image", min(images, default=0)))
    for word, key in (("seed", seed), *ends, ("draw", draw)):
        _check_key(word, key)
    source = _source()
    rows = [source.at(seed, i, draw).standard_normal(tuple(shape[1:])) for i in images]
    return torch.from_numpy(np.stack(rows)) if rows else torch.empty(*shape, dtype=torch.float64)


class Keyed:
    """The white noise of one batch of images: draw 0 is the start, each call takes the next draw.

    Args:
        seed: in [0, 2^64).
        images: the index of each row's image, in [0, 2^64): row i is the same noise in any batch.
    """

    def __init__(self, seed: int, images: Sequence[int]) -> None:
        self.seed, self.images, self.draw = seed, list(images), 0

    def start(self, shape: Sequence[int], dtype: torch.dtype = torch.float32, device: str = "cpu") -> Tensor:
        """Unit normal (B, ...): draw 0, where sampling starts."""
        return normal(shape, self.seed, self.images, 0).to(device, dtype)

    def __call__(self, x: Tensor, now: Level, nxt: Level) -> Tensor:
        """Unit normal of x's shape, dtype and device, for the step from now to nxt."""
        self.draw += 1
        return normal(x.shape, self.seed, self.images, self.draw).to(x.device, x.dtype)


class Draw:
    """The randomness of one training batch, keyed by (seed, update, place in the global batch).

    Neither the number of ranks nor accumulation changes what a sample is given. Each kind of randomness has its own
    stream, so that asking for one does not move another.

    Args:
        seed: of the run, in [0, 2^63).
        update: the optimiser update, counted from 0.
        places: the place of each row in the global batch.

    Raises:
        BadArgument: a seed outside its range.
    """

    _streams = ("time", "noise", "dropout", "augment", "image", "image_time", "window")

    def __init__(self, seed: int, update: int, places: Sequence[int]) -> None:
        if not 0 <= seed < 2**63:
            raise BadArgument(f"seed: got {seed}, need an integer in [0, 2^63)")
        self.seed, self.update, self.places = seed, update, list(places)
        self._source = _Rekeyed()

    def _rows(self, stream: str, place: int) -> np.random.Generator:
        # the image word carries the place and the stream, in banks of four; training's top bit of the seed keeps it
        # apart from sampling's keys
        bank, index = divmod(self._streams.index(stream), 4)
        return self._source.at(self.seed + 2**63, bank * 2**62 + place * 4 + index, self.update)

    def uniform(self, stream: str = "time", count: int | None = None) -> Tensor:
        """Uniform on [0, 1): (B,), or (B, count); float64. Streams: time, dropout, augment, image_time, window."""
        rows = [self._rows(stream, p).random(count) for p in self.places]
        return torch.as_tensor(np.array(rows), dtype=torch.float64)

    def normal(self, shape: Sequence[int], dtype: torch.dtype = torch.float32, stream: str = "noise") -> Tensor:
        """Unit normal of the shape (B, ...), one row a place. Streams: noise, image (an image condition's)."""
        if len(self.places) != shape[0]:
            raise BadShape(f"noise: got {len(self.places)} places for {shape[0]} rows; give one place a row")
        rows = [self._rows(stream, p).standard_normal(tuple(shape[1:])) for p in self.places]
        return torch.from_numpy(np.stack(rows)).to(dtype)
