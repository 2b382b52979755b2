"""Windows: a canvas of any size, answered by a net for one size (MultiDiffusion)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import product

import torch
from torch import Tensor

from inkdrop.core.ask import Ask, Belief, Sampling, relay, revise
from inkdrop.core.level import Level
from inkdrop.errors import BadArgument, BadShape

__all__ = ["windows"]


def _starts(canvas: int, size: int, stride: int) -> list[int]:
    """Where windows begin along one axis: every `stride`, and one that ends with the canvas."""
    starts = list(range(0, canvas - size + 1, stride))
    return starts if starts[-1] == canvas - size else [*starts, canvas - size]


class _Cover:
    """The windows over a canvas (B, C, *S): cut out and stacked, and laid back as a mean."""

    def __init__(self, canvas: Sequence[int], size: Sequence[int], stride: int) -> None:
        axes = [_starts(c, s, stride) for c, s in zip(canvas, size, strict=True)]
        self.slices: list[tuple[slice, ...]] = [
            tuple(slice(a, a + s) for a, s in zip(at, size, strict=True)) for at in product(*axes)
        ]
        self.count = torch.zeros(*canvas)
        for where in self.slices:
            self.count[where] += 1

    def cut(self, x: Tensor) -> Tensor:
        """(B, C, *S) -> (K·B, C, *size): all rows of the first window, then of the next."""
        return torch.cat([x[:, :, *where] for where in self.slices])

    def sum(self, stack: Tensor) -> Tensor:
        """(K·B, C, *size) -> (B, C, *S): the windows laid down and added."""
        parts = stack.chunk(len(self.slices))
        canvas = parts[0].new_zeros(*parts[0].shape[:2], *self.count.shape)
        for part, where in zip(parts, self.slices, strict=True):
            canvas[:, :, *where] += part
        return canvas

    def share(self, x: Tensor) -> Tensor:
        """x over the number of windows on each pixel."""
        return x / self.count.to(x.device, x.dtype)


def windows(sampling: Sampling, *, size: tuple[int, ...], stride: int) -> Sampling:
    """Ask about overlapping windows of the trained size, and believe the mean where they overlap (Bar-Tal et al. 2023).

    x0 of a pixel is the mean over the windows on it, and eps agrees; of MultiDiffusion's least squares (eq. 5) it is
    the solution for every sampler that is linear in x0. A condition is told to every window.
    Cost: one ask of as many rows as there are windows. Place it outermost, nearest the net.

    Args:
        sampling: what to wrap; its state may be of any size that is no smaller than a window.
        size: *S of a window.
        stride: pixels from one window to the next, at least 1 and at most the window's smallest side.

    Raises:
        BadArgument: windows that leave gaps, or a condition with an image.
        BadShape: a canvas smaller than a window.
    """
    if not size or not 1 <= stride <= min(size):
        raise BadArgument(f"windows stride: got {stride}, need 1 to {min(size, default=0)}, so that no gap is left")
    covers: dict[tuple[int, ...], _Cover] = {}

    def cover_of(ask: Ask) -> _Cover:
        canvas = tuple(ask.x.shape[2:])
        if len(canvas) != len(size) or any(c < s for c, s in zip(canvas, size, strict=True)):
            raise BadShape(f"windows: got a canvas of {canvas}, need at least {tuple(size)}")
        return covers.setdefault(canvas, _Cover(canvas, size, stride))

    def before(ask: Ask) -> Ask:
        cover = cover_of(ask)
        k, rows = len(cover.slices), list(range(len(ask.x)))
        level = ask.level if ask.level.alpha.ndim == 0 else Level.cat([ask.level] * k, [len(rows)] * k)
        if ask.cond is not None and ask.cond.image is not None:
            raise BadArgument("windows: got a condition with an image, which is of the canvas and not of a window")
        cond = None if ask.cond is None else ask.cond.take(rows * k)
        return ask._replace(x=cover.cut(ask.x), level=level, cond=cond)

    def after(ask: Ask, belief: Belief) -> Belief:
        cover = cover_of(ask)
        frac = None if belief.var_frac is None else cover.share(cover.sum(belief.var_frac))
        pull = None if belief.pull is None else _pull(belief.pull, cover)
        mean = revise(ask, belief, cover.share(cover.sum(belief.x0)))
        return mean._replace(var_frac=frac, pull=pull)

    return relay(sampling, before, after)


def _pull(pull: Callable[[Tensor], Tensor], cover: _Cover) -> Callable[[Tensor], Tensor]:
    """The pull of the mean: x0 = D⁻¹·Σ_k P_kᵀ·f(P_k·x), so Jᵀ·g = Σ_k P_kᵀ·J_kᵀ·P_k·D⁻¹·g."""
    return lambda g: cover.sum(pull(cover.cut(cover.share(g))))
