"""The exponential moving average of the weights."""

from __future__ import annotations

import copy

import torch
from torch import nn

from inkdrop.errors import BadArgument

__all__ = ["Ema", "decay_at"]


def decay_at(update: int, decay: float) -> float:
    """The decay at an update counted from 0: min(decay, (1 + n)/(10 + n)), so that early averages are not mostly noise.

    After the first update the average is 0.9 new; it reaches 0.999 after some 9,000.
    """
    return min(decay, (1 + update) / (10 + update))


class Ema:
    """Averaged weights: m ← d·m + (1 − d)·w after each optimiser update, d = decay_at(n).

    Args:
        net: whose weights are averaged; the average starts at them.
        decay: in [0, 1).
    """

    def __init__(self, net: nn.Module, decay: float) -> None:
        if not 0 <= decay < 1:
            raise BadArgument(f"ema decay: got {decay:g}, need a number in [0, 1); try 0.999")
        self.decay = decay
        self.net = copy.deepcopy(net).eval().requires_grad_(False)

    @torch.no_grad()
    def update(self, net: nn.Module, update: int) -> None:
        """Average in the weights after optimiser update number `update`, counted from 0; buffers are copied."""
        keep = decay_at(update, self.decay)
        mine = [p.detach() for p in self.net.parameters()]
        theirs = [p.detach() for p in net.parameters()]
        torch._foreach_lerp_(mine, theirs, 1 - keep)
        for buffer, new in zip(self.net.buffers(), net.buffers(), strict=True):
            buffer.copy_(new)
