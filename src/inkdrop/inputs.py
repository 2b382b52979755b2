"""Inputs: pictures and arrays from single files, as a model's data."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from inkdrop.data.images import Channels, decode, is_image, is_raw, recolour, scaled
from inkdrop.errors import BadData, InkdropWarning

__all__ = ["read_array", "read_picture", "read_sized"]

CHANNELS: dict[int, Channels] = {1: "grey", 3: "rgb", 4: "rgba"}


def read_picture(path: Path, shape: tuple[int, ...], background: Literal["white", "black"] = "white") -> Tensor:
    """A picture as (C, H, W) in [-1, 1], recoloured to C channels by the rules of `data.images`.

    Args:
        path: a file of one of the formats that data are read from.
        shape: (C, H, W) that it must have.
        background: what an alpha that is not kept is laid over.

    Raises:
        BadData: it cannot be read, or is of another size.
    """
    channels, height, width = shape
    if path.is_dir():
        raise BadData(f"{path}: is a folder; give its files, as {path}/*.png")
    if not is_image(path.name):
        raise BadData(f"{path}: is no picture; give a .png .jpg .webp .bmp .gif or .npy")
    header, pixels = decode(_bytes(path), str(path))
    if (header.height, header.width) != (height, width):
        raise BadData(
            f"{path}: is {header.width} × {header.height} pixels (width × height), need {width} × {height}; "
            f"resize it to {width} × {height}"
        )
    if not is_raw(path.name):
        if channels == 1 and pixels.shape[2] > 1 and bool((pixels[..., :3] != pixels[..., :1]).any()):
            warnings.warn(f"{path}: is in colour, and is taken as grey: the model has one channel", InkdropWarning, 2)
        pixels = recolour(pixels, CHANNELS[channels], background)
    elif header.bands != channels:
        raise BadData(f"{path}: has {header.bands} channels, need {channels}")
    return torch.from_numpy(np.moveaxis(scaled(pixels), 2, 0).copy())


def read_sized(
    path: Path, shapes: Sequence[tuple[int, ...]], background: Literal["white", "black"] = "white"
) -> Tensor:
    """A picture of one of several sizes, as `read_picture` reads it.

    Raises:
        BadData: it cannot be read, or is of none of these sizes.
    """
    shape, sizes = shapes[0], {shape[1:] for shape in shapes}
    if path.is_file() and is_image(path.name):
        header = decode(_bytes(path), str(path))[0]
        size = (header.height, header.width)
        if size not in sizes and len(sizes) > 1:
            need = " or ".join(f"{wide} × {high}" for high, wide in sorted(sizes))
            raise BadData(f"{path}: is {size[1]} × {size[0]} pixels (width × height), need {need}; resize it")
        shape = next((shape for shape in shapes if shape[1:] == size), shape)
    return read_picture(path, shape, background)


def read_array(path: Path, shape: tuple[int, ...]) -> Tensor:
    """Data that are no pictures, as (N, *shape) float32, from a .npy of one sample or of several.

    Raises:
        BadData: no .npy, or not of this shape.
    """
    if not is_raw(path.name):
        raise BadData(f"{path}: this model's data of shape {shape} are no pictures; give them as .npy")
    try:
        array = np.load(path, allow_pickle=False)
    except (OSError, ValueError) as error:
        raise BadData(f"{path}: cannot be read ({error})") from None
    if array.dtype.kind not in "fiu" or shape not in (array.shape, array.shape[1:]):
        raise BadData(f"{path}: got {array.dtype} {array.shape}, need numbers of shape {shape}, or several of them")
    return torch.from_numpy(array.astype(np.float32)).reshape(-1, *shape)


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise BadData(f"{path}: cannot be read ({error.strerror or error})") from None
