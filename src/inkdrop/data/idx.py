"""IDX files: MNIST and kin, from a local folder or downloaded into a cache.

The format is a big-endian header (two zero bytes, a type code, the number of axes, one 32-bit size an axis) and then
the values (Y. LeCun, C. Cortes, C. Burges, "The MNIST database of handwritten digits").
"""

from __future__ import annotations

import gzip
import math
import re
import struct
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
import torch

from inkdrop.core.dataset import Data
from inkdrop.data.arrays import Arrays, check_split
from inkdrop.data.fetch import cache_folder, fetch
from inkdrop.errors import BadArgument, BadData

__all__ = ["fashion_mnist", "idx", "idx_files", "kmnist", "mnist", "read_idx"]

_LIMIT = 1 << 32  # bytes of pixels: 5 million images of 28 × 28
_BLOCK = 1 << 20
_PREFIX = {"train": "train", "test": "(?:t10k|test)"}
_FILES = (
    "train-images-idx3-ubyte.gz",
    "train-labels-idx1-ubyte.gz",
    "t10k-images-idx3-ubyte.gz",
    "t10k-labels-idx1-ubyte.gz",
)
_DIGITS = tuple(str(digit) for digit in range(10))


class _Home(NamedTuple):
    """Where a published set comes from: mirrors, the MD5 of each of _FILES, its licence and its class names."""

    mirrors: tuple[str, ...]
    md5: tuple[str, str, str, str]
    source: str
    classes: tuple[str, ...]


_MNIST = _Home(
    ("https://ossci-datasets.s3.amazonaws.com/mnist", "https://storage.googleapis.com/cvdf-datasets/mnist"),
    (
        "f68b3c2dcbeaaa9fbdd348bbdeb94873",
        "d53e105ee54ea40749a09fcbcd1e9432",
        "9fb629c4189551a2d022fa330f9573f3",
        "ec29112dd5afa0611ce80d1b7f02629c",
    ),
    "MNIST (Y. LeCun, C. Cortes, C. Burges); often cited as CC BY-SA 3.0",
    _DIGITS,
)
_FASHION = _Home(
    ("http://fashion-mnist.s3-website.eu-central-1.amazonaws.com",),
    (
        "8d4fb7e6c68d591d4c3dfef9ec88bf0d",
        "25c81989df183df01b3e8a0aad5dffbe",
        "bef4ecab320f06d8554ea6380940ec79",
        "bb300cfdad3c16e7a12a480ee83cd310",
    ),
    "Fashion-MNIST (H. Xiao, K. Rasul, R. Vollgraf, 2017, Zalando SE); MIT",
    ("T-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot"),
)
_KMNIST = _Home(
    ("http://codh.rois.ac.jp/kmnist/dataset/kmnist",),
    (
        "bdb82020997e1d708af4cf47b453dcf7",
        "e144d726b3acfaa3e44228e80efcd344",
        "5c965bf0a639b31b8f53240b1b52f4d7",
        "7320c461ea6c1c855c0b718fb2a4b134",
    ),
    "KMNIST (T. Clanuwat et al., 2018, created by CODH from the Kuzushiji Dataset of NIJL and others); CC BY-SA 4.0",
    ("o", "ki", "su", "tsu", "na", "ha", "ma", "ya", "re", "wo"),
)


def mnist(split: str, *, data: Path | None = None, download: bool = False) -> Data:
    """MNIST: handwritten digits, 28 × 28 grey, 60,000 to train on and 10,000 held out.

    Args:
        split: "train" or "test".
        data: a folder with the four files, gzipped or not; the cache by default ($INKDROP_CACHE or ~/.cache/inkdrop).
        download: whether files that the cache lacks may be downloaded; not together with `data`.

    Raises:
        BadData: no such files, or damaged ones.
    """
    return _known("mnist", _MNIST, split, data, download)


def fashion_mnist(split: str, *, data: Path | None = None, download: bool = False) -> Data:
    """Fashion-MNIST: pictures of clothes, 28 × 28 grey, 60,000 to train on and 10,000 held out.

    Args:
        split: "train" or "test".
        data: a folder with the four files, gzipped or not; the cache by default ($INKDROP_CACHE or ~/.cache/inkdrop).
        download: whether files that the cache lacks may be downloaded; not together with `data`.

    Raises:
        BadData: no such files, or damaged ones.
    """
    return _known("fashion_mnist", _FASHION, split, data, download)


def kmnist(split: str, *, data: Path | None = None, download: bool = False) -> Data:
    """KMNIST: ten cursive Japanese characters, 28 × 28 grey, 60,000 to train on and 10,000 held out.

    Args:
        split: "train" or "test".
        data: a folder with the four files, gzipped or not; the cache by default ($INKDROP_CACHE or ~/.cache/inkdrop).
        download: whether files that the cache lacks may be downloaded; not together with `data`.

    Raises:
        BadData: no such files, or damaged ones.
    """
    return _known("kmnist", _KMNIST, split, data, download)


def idx(split: str, *, data: Path, classes: tuple[str, ...] = ()) -> Data:
    """Any folder of IDX files: grey 8-bit images and one label each.

    Reads [NAME-]train-images-idx3-ubyte and [NAME-]train-labels-idx1-ubyte for "train", t10k- or test- for "test"; each
    with or without .gz, "." for the last "-" is taken too.

    Args:
        split: "train" or "test".
        data: the folder.
        classes: the class names; "0", "1", … up to the greatest label of either split by default.

    Raises:
        BadData: a missing, truncated or inconsistent file.
    """
    return _read(split, Path(data).expanduser(), f"idx {split}", f"IDX files in {data}", classes)


def _known(name: str, home: _Home, split: str, data: Path | None, download: bool) -> Data:
    check_split(split)
    if data is not None and download:
        raise BadArgument(f"{name} download: got true with data={data}; give one of them: downloads go to the cache")
    folder = cache_folder(name) if data is None else Path(data).expanduser()
    if download:
        for file, md5 in zip(_FILES, home.md5, strict=True):
            fetch(folder / file, home.mirrors, md5=md5)
    elif data is None and not folder.is_dir():
        raise BadData(
            f"{name}: not downloaded yet (no folder {folder}); try download=true (--set data.download=true), "
            "or data=FOLDER with the four idx files (--data FOLDER)"
        )
    return _read(split, folder, f"{name} {split}", home.source, home.classes)


def _read(split: str, folder: Path, title: str, source: str, classes: Sequence[str]) -> Data:
    check_split(split)
    images, labels = (read_idx(file) for file in idx_files(folder, split))
    if images.ndim != 3 or labels.ndim != 1 or 0 in images.shape or len(images) != len(labels):
        got = f"images of shape {images.shape} and labels of shape {labels.shape}"
        raise BadData(f"{title}: {folder} holds {got}, need (N, H, W) and (N,) with N ≥ 1")
    names = classes or [str(label) for label in range(_most(folder) + 1)]
    pixels = torch.from_numpy(images[:, None])
    return Arrays(pixels, torch.from_numpy(labels), title=title, source=source, classes=names)


def _most(folder: Path) -> int:
    """The greatest label in the folder, so that both splits have the same classes."""
    most = 0
    for split in _PREFIX:
        if _find(folder, split, "labels", 1) is not None:
            most = max(most, int(read_idx(idx_files(folder, split)[1]).max(initial=0)))
    return most


def idx_files(folder: Path, part: str) -> tuple[Path, Path]:
    """The files of images and of labels of a part ("train" or "test") of a folder of IDX files.

    Raises:
        BadData: no such folder or file, or several that could be meant.
    """
    if not folder.is_dir():
        raise BadData(f"{folder}: no such folder; give the folder that holds {_FILES[0]}")
    images, labels = _find(folder, part, "images", 3), _find(folder, part, "labels", 1)
    if images is None or labels is None:
        start = part if part == "train" else "t10k"
        missing = f"{start}-images-idx3-ubyte" if images is None else f"{start}-labels-idx1-ubyte"
        raise BadData(f"{folder}: no file {missing}[.gz]; give the folder that holds it")
    return images, labels


def _find(folder: Path, part: str, kind: str, axes: int) -> Path | None:
    pattern = re.compile(rf"(?:.*-)?{_PREFIX[part]}-{kind}[-.]idx{axes}-ubyte(?:\.gz)?")
    found = sorted(file for file in folder.iterdir() if pattern.fullmatch(file.name) and file.is_file())
    if len({file.name.removesuffix(".gz") for file in found}) > 1:
        raise BadData(f"{folder}: {found[0].name} and {found[-1].name} could both be meant; keep one set a folder")
    return found[0] if found else None  # "x" sorts before "x.gz"


def read_idx(file: Path) -> np.ndarray:
    """The unsigned bytes of one IDX file, gzipped (by its first bytes, not its name) or not: uint8 of 1 to 3 axes.

    The sizes in the header are checked against what the file really holds before anything of that size is made.

    Raises:
        BadData: not IDX, another type than unsigned bytes, truncated, damaged, or longer than its header says.
    """
    try:
        with file.open("rb") as raw:
            zipped = raw.read(2) == b"\x1f\x8b"
            raw.seek(0)
            if not zipped:
                return _values(raw, file)
            with gzip.GzipFile(fileobj=raw) as stream:
                return _values(stream, file)
    except (OSError, EOFError, zlib.error) as error:
        raise BadData(f"{file}: cannot be read ({error}); get the file again") from error


def _values(stream: BinaryIO | gzip.GzipFile, file: Path) -> np.ndarray:
    head = stream.read(4)
    if len(head) < 4 or head[:2] != b"\0\0" or not 1 <= head[3] <= 3:
        raise BadData(f"{file}: starts with {head.hex() or 'nothing'}, which is not IDX; need 0000 08 01 to 0000 08 03")
    if head[2] != 0x08:
        raise BadData(f"{file}: IDX of type 0x{head[2]:02x}, need unsigned bytes (0x08)")
    sizes = stream.read(4 * head[3])
    if len(sizes) < 4 * head[3]:
        raise BadData(f"{file}: ends inside its header; get the file again")
    shape = struct.unpack(f">{head[3]}I", sizes)
    declared = math.prod(shape)
    if declared > _LIMIT:
        raise BadData(f"{file}: declares {shape}, {declared:,} bytes, need at most {_LIMIT:,}")
    body = bytearray()
    while block := stream.read(min(_BLOCK, declared + 1 - len(body))):
        body += block
    if len(body) != declared:
        held = f"{len(body):,}" if len(body) < declared else f"more than {declared:,}"
        raise BadData(f"{file}: declares {shape}, {declared:,} bytes, but holds {held}; get the file again")
    return np.frombuffer(body, dtype=np.uint8).reshape(shape)
