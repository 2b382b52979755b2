"""Nearest neighbours in the training set: are samples copies of training images?"""

from __future__ import annotations

import heapq
from typing import Any, NamedTuple

import torch
from torch import Tensor

from inkdrop.core.check import check_range, check_state
from inkdrop.core.dataset import Data
from inkdrop.errors import BadArgument
from inkdrop.evals.stream import chunk_rows, chunks

__all__ = ["Copies", "Near", "copy_threshold", "nearest"]


class Near(NamedTuple):
    """For each of B images, the nearest image of a data set.

    Attributes:
        distance: (B,) float64, the root mean square difference per value, in [0, 2]; 0 is an exact copy.
        rows: the row of the data set, one for each image; one of them where several are equally near.
    """

    distance: Tensor
    rows: list[int]


def nearest(x: Tensor, data: Data) -> Near:
    """The image of a data set that is nearest to each of x: argmin_j |x_i − y_j|₂ in pixels.

    The candidates are found with |y|² − 2·x·y in float32, chunk by chunk (memory does not grow with the data); the
    distance of the one found is then taken exactly. Costs one pass over the data for every 2,048 rows of x (fewer for
    images larger than 8,192 values).

    Args:
        x: (B, C, *S) in [-1, 1].
        data: of samples of the same shape.

    Returns:
        Distances (B,) and rows.

    Raises:
        BadShape: x of another shape than the data.
        BadData: x outside [-1, 1] or not finite.
        BadArgument: an empty data set.
    """
    check_state(x, data.shape, "nearest")
    check_range(x, "nearest")
    if len(data) == 0:
        raise BadArgument("nearest: got an empty data set, need at least 1 image")
    best = torch.full((len(x),), torch.inf, dtype=torch.float64)
    rows = torch.zeros(len(x), dtype=torch.int64)
    step = chunk_rows(data.shape)
    for start in range(0, len(x), step):
        part = slice(start, min(start + step, len(x)))
        query = x[part].detach().to("cpu", torch.float32).flatten(1)
        for first, y, _ in chunks(data):
            pool = y.flatten(1)
            found = torch.addmm(pool.square().sum(1), query, pool.T, alpha=-2).argmin(1)
            distance = (query - pool[found]).to(torch.float64).square().mean(1).sqrt()
            nearer = distance < best[part]
            best[part] = torch.where(nearer, distance, best[part])
            rows[part] = torch.where(nearer, first + found, rows[part])
    return Near(best, rows.tolist())


def copy_threshold(held_out: Tensor, *, share: float = 0.01) -> float:
    """How near to a training image is suspicious: the 1st percentile of what held-out images come to.

    It is a distance that occurs: the k-th smallest of the N with k = ⌈share·N⌉, so that at least k held-out images are
    that near.

    Args:
        held_out: (N,) distances of held-out images to the training set, N ≥ 1.
        share: in (0, 1].

    Raises:
        BadArgument: no distances, or a share outside (0, 1].
    """
    if held_out.numel() == 0 or not 0 < share <= 1:
        raise BadArgument(f"copies: got {held_out.numel()} distances and share {share}, need ≥ 1 and a share in (0, 1]")
    k = -(-share * held_out.numel() // 1)
    return float(held_out.kthvalue(int(k)).values)


class Copies:
    """A tally of suspiciously near samples over a stream of them, in constant memory.

    A sample is flagged where its distance is at most the threshold. Held-out images are flagged by the same rule: about
    1 % of them by construction, more where distances tie.

    Args:
        held_out: (N,) distances of held-out images to the training set.
        share: the share of held-out images that sets the threshold, in (0, 1].
        keep: how many of the nearest pairs are kept to be shown.
    """

    def __init__(self, held_out: Tensor, *, share: float = 0.01, keep: int = 16) -> None:
        self.threshold = copy_threshold(held_out, share=share)
        self._held_out, self._keep = held_out, keep
        self._n, self._flagged, self._total = 0, 0, 0.0
        self._pairs: list[tuple[float, int, int]] = []

    def update(self, near: Near) -> None:
        """Take in what `nearest` found for the next batch of samples."""
        distances = near.distance.tolist()
        for place, (distance, row) in enumerate(zip(distances, near.rows, strict=True), start=self._n):
            self._pairs.append((distance, place, row))
        self._pairs = heapq.nsmallest(self._keep, self._pairs)
        self._flagged += int((near.distance <= self.threshold).sum())
        self._total += sum(distances)
        self._n += len(distances)

    def report(self) -> dict[str, Any]:
        """The figures as plain JSON.

        Returns:
            threshold; n and copies, how many samples are flagged; rate = copies/n; held_out_n and held_out_rate, the
            same of held-out images; mean and held_out_mean distance; pairs, the nearest ones as
            {"sample": place, "train": row, "distance": d}, nearest first. Distances are RMS per value, in [0, 2].

        Raises:
            BadArgument: no sample was seen.
        """
        if self._n == 0:
            raise BadArgument("copies: got no samples, need at least 1")
        return {
            "threshold": self.threshold,
            "n": self._n,
            "copies": self._flagged,
            "rate": self._flagged / self._n,
            "mean": self._total / self._n,
            "held_out_n": self._held_out.numel(),
            "held_out_rate": float((self._held_out <= self.threshold).to(torch.float64).mean()),
            "held_out_mean": float(self._held_out.mean()),
            "pairs": [{"sample": s, "train": t, "distance": d} for d, s, t in self._pairs],
        }
