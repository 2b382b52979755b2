"""Moving averages of the weights: the exponential one, and power-function ones of which others can be made later."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from functools import cache

import numpy as np
import torch
from torch import Tensor, nn

from inkdrop.errors import BadArgument, BadCheckpoint
from inkdrop.train.shard import own, placed

__all__ = ["LENGTHS", "Ema", "Powers", "decay_at", "mixture", "power_of"]

LENGTHS = (0.05, 0.10)
"""The lengths of the power-function averages that are kept, as relative standard deviations of their profiles."""


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
        mine = [own(p.detach()) for p in self.net.parameters()]
        theirs = [own(p.detach()) for p in net.parameters()]
        torch._foreach_lerp_(mine, theirs, 1 - keep)
        for buffer, new in zip(self.net.buffers(), net.buffers(), strict=True):
            buffer.copy_(new)


@cache
def power_of(length: float) -> float:
    """gamma of the profile p(s) ∝ s^gamma on [0, t] whose standard deviation is length·t.

    length² = (gamma + 1)/((gamma + 2)²·(gamma + 3)): the largest root of gamma³ + 7·gamma² + (16 − 1/length²)·gamma +
    12 − 1/length² (Karras et al. 2024, section 3.1 and algorithm 2).

    Raises:
        BadArgument: a length outside (0, 0.28], beyond which gamma is below 0.
    """
    if not 0 < length <= 0.28:
        raise BadArgument(f"ema length: got {length:g}, need a number in (0, 0.28]; try 0.08")
    inverse = length**-2
    return float(np.roots([1, 7, 16 - inverse, 12 - inverse]).real.max())


class Powers:
    """Power-function averages of the weights: m ← b·m + (1 − b)·w after update t, with b = (1 − 1/t)^{gamma + 1}.

    So w_s has the share (s^{gamma+1} − (s−1)^{gamma+1})/t^{gamma+1}, and the first weights none. An update that was
    skipped is not counted.

    Args:
        net: whose weights are averaged.

    Attributes:
        count: t, the updates so far.

    Reference: Karras et al. 2024, section 3.1.
    """

    def __init__(self, net: nn.Module) -> None:
        self.count = 0
        self._names = [name for name, _ in net.named_parameters()]
        self.averages = [[p.detach().clone() for p in net.parameters()] for _ in LENGTHS]

    @torch.no_grad()
    def update(self, net: nn.Module) -> None:
        """Average in the weights after an optimiser update."""
        self.count += 1
        theirs = [own(p.detach()) for p in net.parameters()]
        for length, mine in zip(LENGTHS, self.averages, strict=True):
            torch._foreach_lerp_([own(p) for p in mine], theirs, 1 - (1 - 1 / self.count) ** (power_of(length) + 1))

    def state_dict(self) -> dict[str, Tensor]:
        """What must be saved to go on, or to make other averages of: "count", and "LENGTH/name" of each average."""
        whole = {"count": torch.tensor(self.count)}
        for length, mine in zip(LENGTHS, self.averages, strict=True):
            whole |= {f"{length:.2f}/{name}": value for name, value in zip(self._names, mine, strict=True)}
        return whole

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Take up a state.

        Raises:
            BadCheckpoint: it is of another net, or there is none.
        """
        if state.keys() != self.state_dict().keys():
            raise BadCheckpoint("snapshots: the checkpoint holds no power-function averages; use train.snapshots=0")
        self.count = int(state["count"])
        for length, mine in zip(LENGTHS, self.averages, strict=True):
            for name, value in zip(self._names, mine, strict=True):
                value.copy_(placed(state[f"{length:.2f}/{name}"], value))


def mixture(ends: Sequence[tuple[int, float]], wanted: tuple[int, float]) -> tuple[list[float], float]:
    """The factors (K,) with which K averages make another: exact least squares of their profiles over all updates.

    Args:
        ends: (t, length) of each average, t ≥ 1.
        wanted: (t, length) of the other, t at most the largest of theirs.

    Returns:
        The factors, and the norm of what they leave of the profile over that of the profile.

    Reference: Karras et al. 2024, section 3.2 and algorithm 3, whose integrals of the profiles are sums here.
    """
    last = max(t for t, _ in ends)
    triangle = np.zeros((0, len(ends) + 1))
    for first in range(1, last + 1, 65_536):  # the QR decomposition of all updates, a block at a time
        step = np.arange(first, min(first + 65_536, last + 1), dtype=np.float64)
        block = np.stack([_profile(step, *end) for end in (*ends, wanted)], axis=1)
        triangle = np.asarray(np.linalg.qr(np.concatenate([triangle, block]), mode="r"))
    rest = triangle[:, -1]
    factors = np.linalg.lstsq(triangle[:, :-1], rest, rcond=None)[0]
    left = np.linalg.norm(triangle[:, :-1] @ factors - rest) / np.linalg.norm(rest)
    return factors.tolist(), float(left)


def _profile(step: np.ndarray, last: int, length: float) -> np.ndarray:
    """The share of each update's weights in the average at update `last`."""
    power = power_of(length) + 1
    reached: np.ndarray = (np.stack([step, step - 1]).clip(max=last) / last) ** power
    share: np.ndarray = reached[0] - reached[1]
    return share
