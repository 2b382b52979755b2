"""The held-out loss: the same samples, times and noise at every call, so that only the weights can move it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from inkdrop.core.noise import Draw
from inkdrop.denoiser import Denoiser
from inkdrop.parallel import ALONE, Ranks
from inkdrop.train.feed import Feed

__all__ = ["BANDS", "held_out_loss"]

BANDS = 5
"""How many bands of time the held-out loss is given for."""


class _FixedDraw(Draw):
    """The same noise at every call; place i of `count` has a time in band i mod BANDS, evenly spread in the band."""

    def __init__(self, seed: int, count: int, places: range) -> None:
        super().__init__(seed, 2**63, places)
        self._count = count

    def uniform(self, stream: str = "time", count: int | None = None) -> Tensor:
        """Evenly spread times; other streams as ever."""
        if stream != "time":
            return super().uniform(stream, count)
        row = torch.tensor(self.places, dtype=torch.float64)
        inner = (row // BANDS + 0.5) / torch.ceil(torch.tensor(self._count / BANDS))
        return ((row % BANDS) + inner) / BANDS


@torch.no_grad()
def held_out_loss(
    denoiser: Denoiser,
    loss: Callable[..., dict[str, Tensor]],
    feed: Feed,
    *,
    seed: int,
    device: torch.device,
    count: int = 256,
    ranks: Ranks = ALONE,
) -> dict[str, Any]:
    """The loss on held-out data, whole and in bands of time.

    Args:
        denoiser: in evaluation mode.
        loss: f(denoiser, x0, cond, draw) -> {"loss": (B,)}.
        feed: the first `count` of its held-out samples are used.
        seed: of the noise.
        device: where the net is.
        count: at most so many samples, at once.
        ranks: each computes its share of them.

    Returns:
        "samples", and if there are at least BANDS of them "loss" and "bands": one number for each fifth of the
        schedule's time, from clean to noise.
    """
    n = min(count, len(feed.held_out))
    if n < BANDS:
        return {"samples": n}
    mine = range(n) if n < ranks.size else ranks.share(n)

    def own() -> Tensor:
        draw = _FixedDraw(seed, n, mine)
        x0, cond = feed.take(mine, draw, denoiser.schedule, held_out=True)
        return loss(denoiser, x0.to(device), None if cond is None else cond.to(device), draw)["loss"]

    losses = ranks.together(own)
    losses = losses if n < ranks.size else ranks.cat(losses)
    bands = [float(losses[i::BANDS].mean()) for i in range(BANDS)]
    return {"samples": n, "loss": float(losses.mean()), "bands": bands}
