"""The form that all images of a folder are brought to: one size, one set of channels, one type."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np

from inkdrop.data.images import Channels, Header, Resize, recolour, resized, scaled, widened
from inkdrop.errors import BadArgument, BadData

__all__ = ["Form", "Wish", "infer", "listing", "suggested_size"]

_LEVELS = {"uint8": 256, "uint16": 65536, "float32": None}


class Wish(NamedTuple):
    """What the caller asked for; see `folder`."""

    size: tuple[int, int] | None = None
    resize: Resize = "none"
    channels: Literal["auto", "grey", "rgb", "rgba"] = "auto"
    background: Literal["white", "black"] = "white"

    @staticmethod
    def of(size: int | Sequence[int] | None, resize: str, channels: str, background: str) -> Wish:
        """The wish, checked.

        Raises:
            BadArgument: a value outside what is allowed, or `resize` without `size`.
        """
        for what, got, allowed in (
            ("resize", resize, ("none", "crop", "stretch")),
            ("channels", channels, ("auto", "grey", "rgb", "rgba")),
            ("background", background, ("white", "black")),
        ):
            if got not in allowed:
                raise BadArgument(f"data {what}: got {got!r}, need one of {', '.join(allowed)}")
        if size is None and resize != "none":
            raise BadArgument(f"data resize: got {resize!r} without a size; add size=64 (--set data.size=64)")
        pair = None if size is None else (size, size) if isinstance(size, int) else tuple(size)
        if pair is not None and (len(pair) != 2 or not all(1 <= side <= 4096 for side in pair)):
            raise BadArgument(f"data size: got {size}, need one number of pixels or (height, width), 1 to 4096")
        return Wish(pair, resize, channels, background)  # type: ignore[arg-type]


class Form(NamedTuple):
    """What every image is brought to.

    Attributes:
        bands: the number of channels.
        size: (height, width) in pixels.
        channels: "grey", "rgb", "rgba", or "raw" for .npy.
        dtype: the narrowest of uint8, uint16 and float32 that holds every image exactly.
        resize: how images of another size are brought to it.
        background: what an alpha that is not kept is laid over.
    """

    bands: int
    size: tuple[int, int]
    channels: Channels
    dtype: str
    resize: Resize
    background: Literal["white", "black"]

    @property
    def levels(self) -> int | None:
        """How many values a channel can take: 256, 65,536, or None for floats."""
        return _LEVELS[self.dtype]

    @property
    def nbytes(self) -> int:
        """Bytes of one image."""
        return self.bands * self.size[0] * self.size[1] * np.dtype(self.dtype).itemsize

    def bring(self, pixels: np.ndarray) -> np.ndarray:
        """Decoded pixels (H, W, C) as this form's (C, H, W): first the size, then the channels.

        Raises:
            BadData: the pixels do not fit the form: their file has changed since it was scanned.
        """
        raw = self.channels == "raw"
        if self.resize != "none":
            pixels = resized(pixels, self.size, self.resize, raw=raw)
        if pixels.shape[:2] != self.size or (raw and pixels.shape[2] != self.bands):
            raise BadData(
                f"got shape {pixels.shape}, need {(*self.size, self.bands)}; the file has changed, start again"
            )
        return widened(recolour(pixels, self.channels, self.background), self.dtype).transpose(2, 0, 1)

    def floats(self, pixels: np.ndarray) -> np.ndarray:
        """Pixels of this form as float32 in [-1, 1]."""
        return scaled(pixels)


def infer(headers: Sequence[Header], files: Sequence[str], wish: Wish, path: Path) -> Form:
    """The form of a folder's images.

    Args:
        headers: of all images, at least one.
        files: their names, for messages.
        wish: what the caller asked for.
        path: the folder, for messages.

    Raises:
        BadData: sizes that differ, .npy files beside pictures or of several channel counts.
        BadArgument: an option that has no effect here.
    """
    size = _size(headers, files, wish, path)
    bands, channels = _channels(headers, wish, path)
    types = {header.dtype for header in headers}
    dtype = "float32" if "float32" in types else "uint16" if "uint16" in types else "uint8"
    laid = channels in ("grey", "rgb") and any(header.bands == 4 for header in headers)
    if wish.background != "white" and not laid:
        raise BadArgument(f"data background: got {wish.background!r}, but no alpha is laid over it here; leave it out")
    return Form(bands, size, channels, dtype, wish.resize, wish.background)


def suggested_size(headers: Sequence[Header]) -> int:
    """A size for images of several: the least short side, as a multiple of 8, in [8, 256] pixels."""
    least = min(min(header.height, header.width) for header in headers)
    return min(max(least // 8 * 8, 8), 256)


def listing(counts: dict[str, int], most: int = 4) -> str:
    """Counts, the greatest first: "32×32: 20, 48×32: 1, and 3 others"."""
    ranked = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    more = f", and {len(ranked) - most} others" if len(ranked) > most else ""
    return ", ".join(f"{name}: {count}" for name, count in ranked[:most]) + more


def _size(headers: Sequence[Header], files: Sequence[str], wish: Wish, path: Path) -> tuple[int, int]:
    sizes = [(header.height, header.width) for header in headers]
    target = wish.size or Counter(sizes).most_common(1)[0][0]
    other = next((i for i, size in enumerate(sizes) if size != target), None)
    if other is None or wish.resize != "none":
        return target
    found = listing(Counter(f"{height}×{width}" for height, width in sizes))
    side = (
        suggested_size(headers) if wish.size is None else wish.size[0] if len(set(wish.size)) == 1 else list(wish.size)
    )
    ask = "images of several sizes" if wish.size is None else f"images that are not {wish.size[0]}×{wish.size[1]}"
    raise BadData(
        f"{path}: {ask} (height×width {found}; one is {files[other]}); "
        f"try --set data.resize=crop --set data.size={side}, or resize=stretch"
    )


def _channels(headers: Sequence[Header], wish: Wish, path: Path) -> tuple[int, Channels]:
    raw = [header.raw for header in headers]
    if any(raw) and not all(raw):
        raise BadData(f"{path}: {sum(raw)} .npy files beside {len(raw) - sum(raw)} pictures; keep one kind in a folder")
    if any(raw):
        counts = Counter(f"{header.bands} channels" for header in headers)
        if len(counts) > 1:
            raise BadData(f"{path}: .npy files of several channel counts ({listing(counts)}); keep one")
        if wish.channels != "auto":
            raise BadArgument(f"data channels: got {wish.channels!r}, but .npy files are never converted; leave it out")
        return headers[0].bands, "raw"
    bands = {header.bands for header in headers}
    auto: Channels = "grey" if bands == {1} else "rgba" if bands == {4} else "rgb"
    channels = auto if wish.channels == "auto" else wish.channels
    return {"grey": 1, "rgb": 3, "rgba": 4}[channels], channels
