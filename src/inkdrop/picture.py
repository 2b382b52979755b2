"""Pictures of samples: tensors in [-1, 1] to 8-bit images and grids."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from inkdrop.errors import BadArgument, BadShape

__all__ = ["grid", "image", "is_picture", "save_grid", "to_bytes"]

MODES = {1: "L", 3: "RGB", 4: "RGBA"}


def is_picture(shape: tuple[int, ...]) -> bool:
    """Whether samples of this shape (C, *S) can be shown as images: 1, 3 or 4 channels of two dimensions."""
    return len(shape) == 3 and shape[0] in MODES


def to_bytes(x: Tensor) -> Tensor:
    """[-1, 1] to uint8: round((x + 1)·127.5), clipped; any shape."""
    return ((x.detach().cpu().float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


def image(x: Tensor) -> Image.Image:
    """One sample (C, H, W) in [-1, 1] as an 8-bit image: 1 channel grey, 3 RGB, 4 RGBA.

    Raises:
        BadShape: another number of channels or dimensions.
    """
    if not is_picture(tuple(x.shape)):
        raise BadShape(f"picture: got shape {tuple(x.shape)}, need 1, 3 or 4 channels (C, H, W); save .npy instead")
    array = to_bytes(x).permute(1, 2, 0).numpy()
    return Image.fromarray(np.ascontiguousarray(array[..., 0] if len(x) == 1 else array), MODES[len(x)])


def grid(x: Tensor, *, columns: int | None = None, scale: int | None = None, gap: int = 1) -> Image.Image:
    """Samples (N, C, *S) as one picture.

    Images are laid out row by row. Points of the line are drawn as a histogram, points of the plane as a density, and
    images of other channel counts by their first channel.

    Args:
        x: the samples, in [-1, 1] where they are images.
        columns: images a row; about √N by default.
        scale: pixels a pixel, ≥ 1; small images are enlarged by default.
        gap: white pixels between images, before scaling.

    Raises:
        BadShape: samples that are neither images nor points of one or two dimensions.
    """
    if x.ndim == 2 and x.shape[1] in (1, 2):
        return _points(x)
    if x.ndim != 4:
        raise BadShape(f"picture: got shape {tuple(x.shape)}, need images (N, C, H, W) or points (N, 1 or 2)")
    if columns is not None and columns < 1:
        raise BadArgument(f"picture columns: got {columns}, need at least 1")
    if x.shape[1] not in MODES:
        x = x[:, :1]
    n, _, height, width = x.shape
    columns = columns or math.ceil(math.sqrt(n))
    rows = math.ceil(n / columns)
    scale = scale or max(1, round(64 / max(height, width)))
    mode = MODES[x.shape[1]]
    size = (columns * (width + gap) + gap, rows * (height + gap) + gap)
    sheet = Image.new(mode, size, 255 if mode == "L" else (255,) * len(mode))
    for i, one in enumerate(x):
        sheet.paste(image(one), (gap + i % columns * (width + gap), gap + i // columns * (height + gap)))
    return sheet.resize((size[0] * scale, size[1] * scale), Image.Resampling.NEAREST)


def _points(x: Tensor) -> Image.Image:
    """A histogram (N, 1) or a density (N, 2) over [-1.25, 1.25], dark where there are many points."""
    values = x.detach().cpu().double().numpy()
    bins, span = 96, (-1.25, 1.25)
    if x.shape[1] == 2:
        density = np.histogram2d(values[:, 1], values[:, 0], bins=bins, range=[span, span])[0][::-1]
    else:
        count = np.histogram(values[:, 0], bins=bins, range=span)[0]
        heights = count / max(1, count.max()) * bins
        density = (np.arange(bins)[::-1, None] < heights).astype(float)
    shade = 255 - 255 * np.sqrt(density / max(1e-12, density.max()))
    return Image.fromarray(shade.round().astype(np.uint8), "L").resize((bins * 4, bins * 4), Image.Resampling.NEAREST)


def save_grid(x: Tensor, path: Path | str, *, columns: int | None = None, scale: int | None = None) -> None:
    """Write `grid(x)` to a PNG file; samples as `grid` takes them."""
    grid(x, columns=columns, scale=scale).save(path)
