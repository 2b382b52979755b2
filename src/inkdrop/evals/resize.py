"""Resize: images as the nets of published scores take them, with clean-fid's resizing or with pytorch-fid's."""

from __future__ import annotations

from typing import Literal, TypeAlias

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional

from inkdrop.errors import BadShape
from inkdrop.picture import to_bytes

__all__ = ["Resize", "clean", "legacy", "to_rgb"]

Resize: TypeAlias = Literal["clean", "pytorch-fid"]
"""clean: Pillow's bicubic with antialiasing; pytorch-fid: torch's bilinear without."""


def to_rgb(x: Tensor) -> Tensor:
    """Images (B, C, H, W) in [-1, 1] as 8-bit RGB, (B, 3, H, W): grey three times, an alpha channel left out.

    Raises:
        BadShape: neither 1, 3 nor 4 channels.
    """
    if x.ndim != 4 or x.shape[1] not in (1, 3, 4):
        raise BadShape(f"features: got images of shape {tuple(x.shape)}, need (B, C, H, W) with 1, 3 or 4 channels")
    return to_bytes(x[:, :3] if x.shape[1] == 4 else x).expand(-1, 3, -1, -1)


def clean(x: Tensor, side: int) -> Tensor:
    """Resized as clean-fid does: each channel by Pillow's bicubic on floats with antialiasing, clipped to [0, 255].

    Args:
        x: uint8 (B, C, H, W).
        side: of the result, ≥ 1.

    Returns:
        float32 (B, C, side, side) in [0, 255], not rounded.

    Reference: Parmar, Zhang & Zhu, "On aliased resizing and surprising subtleties in GAN evaluation", 2022, section 3.
    """
    planes = x.flatten(0, 1).to(torch.float32).numpy()
    made = np.empty((len(planes), side, side), np.float32)
    for into, plane in zip(made, planes, strict=True):
        into[:] = np.asarray(Image.fromarray(plane).resize((side, side), Image.Resampling.BICUBIC))
    resized: Tensor = torch.from_numpy(made).clamp(0, 255).unflatten(0, x.shape[:2])
    return resized


def legacy(x: Tensor, side: int) -> Tensor:
    """Resized as pytorch-fid does: bilinear without antialiasing, which aliases when it shrinks.

    Args:
        x: uint8 (B, C, H, W).
        side: of the result, ≥ 1.

    Returns:
        float32 (B, C, side, side) in [0, 255].
    """
    small: Tensor = functional.interpolate(x.to(torch.float32), (side, side), mode="bilinear", align_corners=False)
    return small
