"""Tiles: a map of large images by overlapping windows, blended linearly, in bounded memory."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from inkdrop.errors import BadArgument

__all__ = ["check_tile", "in_tiles", "starts"]


def check_tile(tile: int, overlap: int) -> None:
    """Refuse tiles that cannot be blended.

    Raises:
        BadArgument: tile below 4 or overlap outside [0, tile/2].
    """
    if tile < 4:
        raise BadArgument(f"tile: got {tile}, need at least 4 latent positions; try 64")
    if not 0 <= overlap <= tile // 2:
        raise BadArgument(f"overlap: got {overlap}, need 0 to {tile // 2}, half a tile of {tile}; try {tile // 4}")


def starts(size: int, tile: int, overlap: int) -> list[int]:
    """Where the windows of a side begin: every tile − overlap, the last one flush with the end.

    Args:
        size: of the side, ≥ 1.
        tile: of a window.
        overlap: of two neighbours, below tile; the last two may share more.
    """
    if size <= tile:
        return [0]
    return [*range(0, size - tile, tile - overlap), size - tile]


def in_tiles(run: Callable[[Tensor], Tensor], x: Tensor, *, inp: int, out: int, tile: int, overlap: int) -> Tensor:
    """run(x) put together from windows of x, for a run that makes `out` places of every `inp`.

    In an overlap of o places one window gives way to the next: of its o places the outer quarter counts nothing and
    the middle half is a linear ramp, (u − o/4)/(o/2) at a distance u from the edge, so that the two weights sum to 1.
    A run that sees no further than o/4 places therefore gives what it gives on the whole, but for rounding; what
    looks at all of a window (attention, group normalisation) differs from window to window.

    Args:
        run: (B, C, inp·h, inp·w) -> (B, C', out·h, out·w), for any h and w up to tile.
        x: (B, C, inp·H, inp·W).
        inp: pixels of x a place.
        out: pixels of the result a place.
        tile: places a side of a window, ≥ 4.
        overlap: places that neighbours share, in [0, tile/2].

    Returns:
        (B, C', out·H, out·W).

    Raises:
        BadArgument: tile or overlap out of range.
    """
    check_tile(tile, overlap)
    high, wide = (side // inp for side in x.shape[-2:])
    if max(high, wide) <= tile:
        return run(x)
    rows, columns = _shares(high, tile, overlap, out), _shares(wide, tile, overlap, out)
    total = x.new_zeros(0)
    for top, down in rows.items():
        for left, across in columns.items():
            part = run(x[..., top * inp : (top + tile) * inp, left * inp : (left + tile) * inp])
            if not total.numel():
                total = part.new_zeros((*part.shape[:2], high * out, wide * out))
            weight = (down[:, None] * across).to(part.device, part.dtype)
            total[..., top * out : (top + tile) * out, left * out : (left + tile) * out] += weight * part
    return total


def _shares(size: int, tile: int, overlap: int, out: int) -> dict[int, Tensor]:
    """Where each window of a side begins -> its share in each of its places, float64; they sum to 1 everywhere."""
    length, total = min(tile, size), torch.zeros(out * size, dtype=torch.float64)
    weights = {
        begin: _ramp(length, overlap, out, first=begin == 0, last=begin + length == size)
        for begin in starts(size, tile, overlap)
    }
    for begin, weight in weights.items():
        total[out * begin : out * (begin + length)] += weight
    return {begin: weight / total[out * begin : out * (begin + length)] for begin, weight in weights.items()}


def _ramp(length: int, overlap: int, out: int, *, first: bool, last: bool) -> Tensor:
    """A window's weight along one side, in (0, 1) on the ramps at the edges that it shares."""
    u = (torch.arange(out * length, dtype=torch.float64) + 0.5) / out
    if overlap == 0:
        return torch.ones_like(u)
    rise = ((u - overlap / 4) / (overlap / 2)).clamp(0, 1)
    ones = torch.ones_like(u)
    return (ones if first else rise) * (ones if last else rise.flip(0))
