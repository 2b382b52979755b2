"""One Brownian path an image: the same noise whatever the number of steps."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from inkdrop.core.level import Level
from inkdrop.core.noise import normal
from inkdrop.errors import BadArgument

__all__ = ["Brownian"]

TOP = 20.0  # the path is known for half log-SNRs in [−TOP, TOP]; below −TOP it is 0
DEPTH = 26  # two levels nearer than 2·TOP/2^DEPTH = 6e-7 share a leaf, in which the path is straight
ROOT = 2**31  # draws of the path's nodes, apart from the white draws 0, 1, 2, ...


class Brownian:
    """Noise for stochastic solvers whose path does not depend on the steps that are taken along it.

    B is a standard Brownian motion in SNR = (alpha/sigma)², B(0) = 0, one for each image, and a step from level t to s
    gets (B(SNR_s) − B(SNR_t))/√(SNR_s − SNR_t), a unit normal. SNR is the clock in which the noise of the
    variance-preserving reverse SDE adds up: solvers that integrate it exactly (the SDE variants of DPM-Solver++)
    take the very same path in 10 steps as in 100, and others approach theirs.

    The path is built by halving (Lévy's construction) in half log-SNR over [−20, 20]: node k of the tree is a bridge
    between its neighbours with the normal of draw 2^31 + k, so the order and the number of questions change nothing.

    Args:
        seed: in [0, 2^64).
        images: the index of each row's image, in [0, 2^64): row i is the same path in any batch.
    """

    def __init__(self, seed: int, images: Sequence[int]) -> None:
        self.seed, self.images = seed, list(images)
        self._nodes: dict[int, Tensor] = {}

    def start(self, shape: Sequence[int], dtype: torch.dtype = torch.float32, device: str = "cpu") -> Tensor:
        """Unit normal (B, ...): draw 0, where sampling starts; that of `Keyed`."""
        return normal(shape, self.seed, self.images, 0).to(device, dtype)

    def __call__(self, x: Tensor, now: Level, nxt: Level) -> Tensor:
        """Unit normal of x's shape, dtype and device: the path's increment from now to nxt, normalised.

        Raises:
            BadArgument: nxt is clean or not less noisy than now, where there is no increment.
        """
        low, high = (min(max(float(level.lam), -TOP), TOP) for level in (now, nxt))
        if nxt.clean or not high > low:
            raise BadArgument("brownian noise: the next level must be noisy, and less so than this one")
        fresh = (self._at(high, x.shape) - self._at(low, x.shape)) / math.sqrt(_snr(high) - _snr(low))
        return fresh.to(x.device, x.dtype)

    def _at(self, lam: float, shape: Sequence[int]) -> Tensor:
        """B at SNR = e^{2·lam}: down the tree, keeping the nodes of this way for the next question."""
        draw = partial(normal, shape, self.seed, self.images)
        way = {0: self._nodes[0] if 0 in self._nodes else math.exp(TOP) * draw(ROOT)}
        left, right, low, high, node = torch.zeros_like(way[0]), way[0], -TOP, TOP, 1
        for _ in range(DEPTH):
            middle = (low + high) / 2
            a, b, c = _snr(low), _snr(middle), _snr(high)
            if node in self._nodes:
                value = self._nodes[node]
            else:  # the bridge between the neighbours
                part = (b - a) / (c - a)
                value = left + part * (right - left) + math.sqrt(part * (c - b)) * draw(ROOT + node)
            way[node] = value
            if lam < middle:
                right, high, node = value, middle, 2 * node
            else:
                left, low, node = value, middle, 2 * node + 1
        self._nodes = way
        return left + (_snr(lam) - _snr(low)) / (_snr(high) - _snr(low)) * (right - left)


def _snr(lam: float) -> float:
    """e^{2·lam}, and 0 at the bottom of the tree, where the path starts."""
    return math.exp(2 * lam) if lam > -TOP else 0.0
