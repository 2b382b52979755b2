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
DEPTH = 16  # levels nearer than 2·TOP/2^DEPTH = 6e-4 may share a leaf, in which one number bends the path
ROOT = 2**31  # draws of the path's nodes, apart from the white draws 0, 1, 2, ...


class Brownian:
    """Noise for stochastic solvers whose path does not depend on the steps that are taken along it.

    B is a standard Brownian motion in SNR = (alpha/sigma)², B(0) = 0, one for each image, and a step from level t to s
    gets (B(SNR_s) − B(SNR_t))/√(SNR_s − SNR_t), a unit normal. SNR is the clock in which the noise of the
    variance-preserving reverse SDE adds up: solvers that integrate it exactly (the SDE variants of DPM-Solver++)
    take the very same path in 10 steps as in 100, and others approach theirs.

    The path is built by halving (Lévy's construction) in half log-SNR over [−20, 20]: node k of the tree is a bridge
    between its neighbours with the normal of draw 2^31 + k, so the order and the number of questions change nothing.
    Levels more than 6e-4 apart have exactly the law of a Brownian motion; in 1,000 steps of any schedule they are 2e-3
    apart and more. Cost: ten normals a number for a step of fifty, for what neighbouring steps share is kept.

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
            raise BadArgument(
                f"brownian noise: got a step from half log-SNR {float(now.lam):g} to {float(nxt.lam):g}, need one to a "
                "level that is less noisy, and not clean; try white noise, which restart and Langevin steps need"
            )
        start = self._at(low, x.shape)  # first, for it is where the step before ended
        fresh = (self._at(high, x.shape) - start) / math.sqrt(_snr(high) - _snr(low))
        return fresh.to(x.device, x.dtype)

    def _at(self, lam: float, shape: Sequence[int]) -> Tensor:
        """B at SNR = e^{2·lam}: down the tree, keeping the nodes of this way for the next question."""
        known, way = self._nodes, {}
        draw = partial(normal, shape, self.seed, self.images)
        way[0] = known[0] if 0 in known else math.exp(TOP) * draw(ROOT)
        left, right, low, high, node = torch.zeros_like(way[0]), way[0], -TOP, TOP, 1
        for _ in range(DEPTH):
            middle = (low + high) / 2
            if node in known:
                way[node] = known[node]
            else:
                way[node] = _bridge(left, right, _snr(low), _snr(middle), _snr(high), draw(ROOT + node))
            if lam < middle:
                right, high, node = way[node], middle, 2 * node
            else:
                left, low, node = way[node], middle, 2 * node + 1
        way[node] = known[node] if node in known else draw(ROOT + node)  # of a leaf its normal is kept, not a value
        self._nodes = way
        return _bridge(left, right, _snr(low), _snr(lam), _snr(high), way[node])


def _bridge(left: Tensor, right: Tensor, a: float, b: float, c: float, z: Tensor) -> Tensor:
    """B(b) given B(a) = left and B(c) = right, a <= b <= c, from a unit normal z."""
    part = (b - a) / (c - a)
    return left + part * (right - left) + math.sqrt(part * (c - b)) * z


def _snr(lam: float) -> float:
    """e^{2·lam}, and 0 at the bottom of the tree, where the path starts."""
    return math.exp(2 * lam) if lam > -TOP else 0.0
