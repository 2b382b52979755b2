"""Inpainting: known pixels are held, the others are drawn to go with them (replacement, and RePaint's resampling)."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from inkdrop.core.ask import Ask, Belief, Noise, Sampler, Sampling, relay, revise
from inkdrop.core.forward import step
from inkdrop.core.grid import Grid
from inkdrop.errors import BadArgument, BadShape

__all__ = ["fitted", "inpaint", "repaint"]


def inpaint(sampling: Sampling, known: Tensor, keep: Tensor) -> Sampling:
    """Inpainting by replacement: x0 ← known where it is kept, the net's x0 elsewhere; eps agrees.

    What is known of a pixel is all there is to believe about it: its belief is a point mass. So the sampler itself
    carries its state as alpha·known + sigma·eps: a deterministic one keeps the eps it started with, a stochastic one
    draws from q(x_s | x_t, x0) with the true x0 (as far as it is exact for a point), and every one ends at known
    itself. The state is never touched, and multistep histories, second stages and step sizes all stay consistent.
    Song et al. 2021 (score SDE, appendix I.2) and Lugmayr et al. 2022 (eq. 8) overwrite the state by a fresh draw of
    alpha·known + sigma·noise after each step: the same distribution at each level, but another noise each time, which
    breaks multistep histories.
    Cost: none. The net sees the known pixels, but what it drew before does not bend to them; `repaint` mends that.

    Args:
        sampling: what to wrap; its start should be at alpha·known + sigma·noise where pixels are kept.
        known: (B, C, *S) clean data; entries that are not kept mean nothing.
        keep: bool, broadcast to known; True where known is kept.

    Raises:
        BadShape: keep is not bool, or does not fit known.
    """
    keep = fitted(keep, known)

    def after(ask: Ask, belief: Belief) -> Belief:
        held = revise(ask, belief, torch.where(keep, known, belief.x0))
        pull = belief.pull
        return held if pull is None else held._replace(pull=lambda g: pull(torch.where(keep, 0, g)))

    return relay(sampling, lambda ask: ask, after)


def fitted(keep: Tensor, known: Tensor) -> Tensor:
    """A mask as bool of the shape of known.

    Raises:
        BadShape: it is not bool, or does not broadcast to known.
    """
    try:
        fits = keep.dtype == torch.bool and torch.broadcast_shapes(keep.shape, known.shape) == known.shape
    except RuntimeError:  # what broadcast_shapes raises where they do not fit
        fits = False
    if not fits:
        raise BadShape(
            f"inpaint keep: got {keep.dtype} {tuple(keep.shape)}, need bool {tuple(known.shape)}, 1 where it is shared"
        )
    return keep.expand(known.shape)


def repaint(sampler: Sampler, x: Tensor, grid: Grid, noise: Noise, *, jump: int = 10, resample: int = 10) -> Sampling:
    """RePaint: go down `jump` steps, back up by the forward process, and down again, `resample` times in all.

    x_t = a·x_s + √(sigma_t² − a²·sigma_s²)·noise, a = alpha_t/alpha_s, one jump of the forward process over the block
    (Lugmayr et al. 2022, algorithm 1 and appendix B). Each pass lets the unknown pixels bend to the known ones and the
    other way round. The last noisy level and the clean one are reached once. With resample = 1 it is the sampler as
    it is; else a multistep sampler starts its history anew at each block.
    Cost: about `resample` times the sampler's. An exact sampler's distribution at each level is kept.

    Args:
        sampler: with `inpaint` round it.
        x: (B, C, *S), at grid[0].
        grid: levels in falling order.
        noise: fresh noise, also for going up, where `now` is less noisy than `nxt`; it must be white.
        jump: the length of a block in steps, ≥ 1 (their j; 10 of 250 steps in the paper).
        resample: passes over each block, ≥ 1 (their r; 10 in the paper).

    Raises:
        BadArgument: a knob below 1.
    """
    for what, number in (("jump", jump), ("resample", resample)):
        if number < 1:
            raise BadArgument(f"repaint {what}: got {number}, need at least 1; try 10")
    if resample == 1:
        return (yield from sampler(x, grid, noise))
    last = len(grid) - 2 if grid[-1].clean else len(grid) - 1  # of the levels that are reached more than once
    ends = [*range(0, last, jump), last]
    for start, end in pairwise(ends):
        for _ in range(resample - 1):
            x = yield from sampler(x, grid[start : end + 1], noise)
            x = step(x, noise(x, grid[end], grid[start]), grid[end], grid[start])
        x = yield from sampler(x, grid[start : end + 1], noise)
    return (yield from sampler(x, grid[last:], noise)) if grid[-1].clean else x
