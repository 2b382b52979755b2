"""Images: the bytes of a file to pixels, by stated rules.

| in the file | becomes |
|---|---|
| 8 bits, grey or colour | v/127.5 − 1 |
| 16 bits, grey PNG or uint16 .npy | v/32767.5 − 1 |
| 16 bits, colour PNG | its upper 8 bits (Pillow reads no more) |
| 1, 2 or 4 bits, grey | spread over 0..255 |
| palette | RGB; RGBA if it has transparency |
| grey with alpha | RGBA |
| CMYK | RGB, (255 − C)(255 − K)/255 and so on |
| float .npy | itself; it must lie in [-1, 1] |

EXIF rotation is applied; colour profiles are not; of an animation the first frame is taken.
"""

from __future__ import annotations

import io
import math
from typing import Literal, NamedTuple, TypeAlias

import numpy as np
from PIL import Image, UnidentifiedImageError

from inkdrop.errors import BadData

__all__ = [
    "Channels",
    "Header",
    "Resize",
    "decode",
    "inspect",
    "is_image",
    "is_raw",
    "recolour",
    "resized",
    "scaled",
    "widened",
]

Channels: TypeAlias = Literal["grey", "rgb", "rgba", "raw"]
Resize: TypeAlias = Literal["none", "crop", "stretch"]

_FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF")
_SUFFIXES = (".png", ".jpg", ".jpeg", ".jfif", ".webp", ".bmp", ".gif", ".npy")
_ORIENTATION = 0x0112
_HALF = {"uint8": 127.5, "uint16": 32767.5}


class Header(NamedTuple):
    """What a file holds, by its header.

    Attributes:
        height: in pixels, after EXIF rotation.
        width: in pixels, after EXIF rotation.
        bands: 1 grey, 3 RGB, 4 RGBA; any number for .npy.
        dtype: of the decoded pixels: "uint8", "uint16" or "float32".
        mode: what the file itself says, for people: "RGB", "P", "I;16", "16-bit RGB".
        raw: whether the bands are those of a .npy, which no rule converts.
    """

    height: int
    width: int
    bands: int
    dtype: str
    mode: str
    raw: bool


def is_image(name: str) -> bool:
    """Whether a file's name ends as those do that are read: .png .jpg .jpeg .jfif .webp .bmp .gif .npy."""
    return name.lower().endswith(_SUFFIXES)


def is_raw(name: str) -> bool:
    """Whether a file is an array (.npy) rather than a picture."""
    return name.lower().endswith(".npy")


def inspect(data: bytes, name: str) -> Header:
    """The header of a file; the pixels are not decoded.

    Raises:
        BadData: not an image of these formats, or refused by the rules; the message begins with the name.
    """
    return _array(data, name)[0] if is_raw(name) else _picture(data, name)[0]


def decode(data: bytes, name: str) -> tuple[Header, np.ndarray]:
    """The header and the pixels of a file, (H, W, C) of uint8, uint16 or float32 as the header says.

    Raises:
        BadData: truncated or damaged, or floats outside [-1, 1]; the message begins with the name.
    """
    return _array(data, name, pixels=True) if is_raw(name) else _picture(data, name, pixels=True)


def resized(pixels: np.ndarray, size: tuple[int, int], how: Resize, *, raw: bool) -> np.ndarray:
    """Pixels (H, W, C) at another size (H', W'), by Pillow's Lanczos filter, which averages when it shrinks.

    "crop" takes the largest centred part of the new shape: the short side is scaled to fit, the rest cut off evenly.
    "stretch" takes the whole. Colours are weighted by their alpha, except in raw bands. The result is rounded and
    clipped to the range of its type.
    """
    height, width = pixels.shape[:2]
    if (height, width) == size:
        return pixels
    scale = max(size[0] / height, size[1] / width)
    tall, wide = (size[0] / scale, size[1] / scale) if how == "crop" else (height, width)
    left, top = (width - wide) / 2, (height - tall) / 2
    box = (left, top, min(left + wide, width), min(top + tall, height))

    def once(band: np.ndarray) -> np.ndarray:
        out: np.ndarray = np.asarray(Image.fromarray(band).resize(size[::-1], Image.Resampling.LANCZOS, box=box))
        return out

    if pixels.dtype == np.uint8 and not raw:
        return once(pixels.squeeze(2) if pixels.shape[2] == 1 else pixels).reshape(*size, -1)
    bands = np.stack([once(band.astype(np.float32)) for band in np.moveaxis(pixels, 2, 0)], axis=2)
    whole = pixels.dtype != np.float32
    low, high = (0, np.iinfo(pixels.dtype).max) if whole else (-1, 1)
    out: np.ndarray = np.clip(np.rint(bands) if whole else bands, low, high).astype(pixels.dtype)
    return out


def recolour(pixels: np.ndarray, channels: Channels, background: Literal["white", "black"]) -> np.ndarray:
    """Pixels (H, W, 1|3|4) as grey, RGB or RGBA.

    An alpha that is not kept is laid over the background: round((v·a + b·(255 − a))/255). Grey from colour is ITU-R
    601 luma, 0.299·R + 0.587·G + 0.114·B. An alpha that is missing is opaque. "raw" changes nothing.
    """
    bands = pixels.shape[2]
    if channels == "raw" or bands == {"grey": 1, "rgb": 3, "rgba": 4}[channels]:
        return pixels
    if bands == 4:
        colour, alpha = pixels[..., :3].astype(np.uint32), pixels[..., 3:].astype(np.uint32)
        under = 255 if background == "white" else 0
        pixels = ((colour * alpha + under * (255 - alpha) + 127) // 255).astype(np.uint8)
    if channels == "grey":
        return pixels if bands == 1 else np.asarray(Image.fromarray(pixels).convert("L"))[..., None]
    if bands == 1:
        pixels = pixels.repeat(3, axis=2)
    if channels == "rgb":
        return pixels
    opaque = np.full_like(pixels[..., :1], np.iinfo(pixels.dtype).max)
    return np.concatenate([pixels, opaque], axis=2)


def widened(pixels: np.ndarray, dtype: str) -> np.ndarray:
    """Pixels in a type that holds them exactly: uint8 v is uint16 257·v, for both are 2v/255 − 1; or scaled floats."""
    if pixels.dtype == np.dtype(dtype):
        return pixels
    return pixels.astype(np.uint16) * 257 if dtype == "uint16" else scaled(pixels)


def scaled(pixels: np.ndarray) -> np.ndarray:
    """Pixels as float32 in [-1, 1]: v/127.5 − 1 for uint8, v/32767.5 − 1 for uint16, floats as they are."""
    half = _HALF.get(pixels.dtype.name)
    return pixels.astype(np.float32) if half is None else pixels.astype(np.float32) / np.float32(half) - 1


def _picture(data: bytes, name: str, *, pixels: bool = False) -> tuple[Header, np.ndarray]:
    """The header of a picture, and its pixels if asked for (else an empty array)."""
    if not data:
        raise BadData(f"{name}: an empty file")
    try:
        with Image.open(io.BytesIO(data), formats=_FORMATS) as im:
            limit = Image.MAX_IMAGE_PIXELS
            if limit is not None and im.width * im.height > limit:
                raise BadData(f"{name}: {im.width} × {im.height} is more than {limit:,} pixels")
            turn = _orientation(im, data)
            header = _header(im, data, turn)
            return header, _turned(_natural(im, header), turn) if pixels else np.empty(0)
    except BadData:
        raise
    except UnidentifiedImageError as error:
        raise BadData(f"{name}: not a PNG, JPEG, WebP, BMP or GIF image, or its beginning is damaged") from error
    except Exception as error:  # Pillow's decoders raise nearly anything on a damaged file
        reason = " ".join(str(error).split()) or type(error).__name__
        raise BadData(f"{name}: cannot be decoded ({reason})") from error


def _header(im: Image.Image, data: bytes, turn: int) -> Header:
    height, width = (im.width, im.height) if turn >= 5 else (im.height, im.width)
    deep = im.format == "PNG" and data[24:25] == b"\x10"  # the bit depth in IHDR
    if im.mode.startswith("I"):
        return Header(height, width, 1, "uint16", "I;16", raw=False)
    mode = f"16-bit {im.mode}" if deep else im.mode
    bands = 4 if im.has_transparency_data else 1 if im.mode in ("1", "L") else 3
    return Header(height, width, bands, "uint8", mode, raw=False)


def _natural(im: Image.Image, header: Header) -> np.ndarray:
    """The pixels as they are stored, (H, W, bands), before rotation."""
    if header.dtype == "uint16":
        return np.asarray(im).astype(np.uint16)[..., None]
    plain = im.convert({1: "L", 3: "RGB", 4: "RGBA"}[header.bands])
    return np.array(plain).reshape(im.height, im.width, header.bands)


def _orientation(im: Image.Image, data: bytes) -> int:
    """The EXIF orientation, 1 to 8; Pillow decodes a whole PNG to look for it, so only where it could be."""
    marks = (b"eXIf", b"Raw profile type exif", b"XML:com.adobe.xmp")
    if im.format == "PNG" and not any(mark in data for mark in marks):
        return 1
    found = im.getexif().get(_ORIENTATION, 1)
    return found if found in range(1, 9) else 1


def _turned(stored: np.ndarray, turn: int) -> np.ndarray:
    """The pixels upright, by EXIF 2.32 §4.6.4 A (orientation): 5 to 8 swap rows and columns."""
    if turn >= 5:
        stored = stored.swapaxes(0, 1)
    upside_down, mirrored = turn in (3, 4, 7, 8), turn in (2, 3, 6, 7)
    return np.ascontiguousarray(stored[:: -1 if upside_down else 1, :: -1 if mirrored else 1])


def _npy_header(data: bytes, name: str) -> tuple[tuple[int, int, int], np.dtype, Literal["C", "F"], int]:
    """Shape (H, W, C), type, order of the axes and offset of the values of a .npy."""
    stream = io.BytesIO(data)
    readers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    try:
        shape, fortran, dtype = readers[np.lib.format.read_magic(stream)](stream)
    except Exception as error:  # NumPy's reader of Python 2 headers raises nearly anything too
        raise BadData(f"{name}: not a .npy file, or its header is damaged") from error
    if dtype.kind not in "uf" or dtype.itemsize > (2 if dtype.kind == "u" else 8):
        raise BadData(f"{name}: got {dtype}, need uint8, uint16 or float; convert it before saving")
    if len(shape) not in (2, 3) or 0 in shape:
        raise BadData(f"{name}: got shape {shape}, need (H, W) or (H, W, C)")
    need = math.prod(shape) * dtype.itemsize
    if len(data) - stream.tell() != need:
        raise BadData(f"{name}: holds {len(data) - stream.tell():,} bytes of values, need {need:,} for {shape} {dtype}")
    height, width, *bands = shape
    return (height, width, bands[0] if bands else 1), dtype, "F" if fortran else "C", stream.tell()


def _array(data: bytes, name: str, *, pixels: bool = False) -> tuple[Header, np.ndarray]:
    """The header of a .npy, and its values if asked for (else an empty array)."""
    shape, stored, order, offset = _npy_header(data, name)
    dtype = stored.newbyteorder("=")
    header = Header(*shape, "float32" if dtype.kind == "f" else dtype.name, f"npy {dtype.name}", raw=True)
    if not pixels:
        return header, np.empty(0)
    values = np.frombuffer(data, stored, offset=offset).reshape(shape, order=order)
    low, high = float(values.min()), float(values.max())
    if dtype.kind == "f" and not (low >= -1 and high <= 1):
        raise BadData(f"{name}: got floats in [{low:g}, {high:g}], need [-1, 1]; scale them before saving")
    return header, np.ascontiguousarray(values.astype(header.dtype))
