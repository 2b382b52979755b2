"""Level: how much noise is in a tensor, as the pair (alpha, sigma)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Level"]


class Level(NamedTuple):
    """One noise level: x_t = alpha·x0 + sigma·eps with eps ~ N(0, I).

    DDPM, cosine, EDM, flow matching and NCSN are different ways to make this pair; nothing above
    the schedules asks which one it was.

    Attributes:
        alpha: the scale of the clean signal, ≥ 0; 0-dim float64 on the CPU for samplers (so that a float32
            state stays float32), or (B,) float64 where each row has its own level.
        sigma: the standard deviation of the noise, ≥ 0; shape as alpha.
        t: time in [0, 1], 0 clean and 1 noise; shape as alpha.
    """

    alpha: Tensor
    sigma: Tensor
    t: Tensor

    @property
    def rho(self) -> Tensor:
        """The noise-to-signal ratio sigma/alpha in [0, ∞] (EDM's sigma)."""
        return self.sigma / self.alpha

    @property
    def lam(self) -> Tensor:
        """Half the log signal-to-noise ratio, log(alpha/sigma), in nats; +∞ clean, −∞ pure noise."""
        return (self.alpha / self.sigma).log()

    @property
    def snr(self) -> Tensor:
        """The signal-to-noise ratio alpha²/sigma² = e^{2·lam} in [0, ∞]."""
        return (self.alpha / self.sigma) ** 2

    @property
    def clean(self) -> bool:
        """Whether this (0-dim) level carries no noise at all."""
        return float(self.sigma) == 0

    def rows(self, n: int) -> Level:
        """The same level for each of n rows: fields of shape (n,)."""
        return Level(*(f.expand(n) for f in self))

    def over(self, x: Tensor) -> Level:
        """Fields shaped to multiply x of shape (B, ...): 0-dim as they are, (B,) as (B, 1, ...) in x's dtype."""
        if self.alpha.ndim == 0:
            return self
        shape = (-1,) + (1,) * (x.ndim - 1)
        return Level(*(f.to(x.device, x.dtype).reshape(shape) for f in self))

    @staticmethod
    def cat(levels: list[Level], counts: list[int]) -> Level:
        """Levels of several questions as one per-row level; counts[i] rows take levels[i]."""
        return Level(*(torch.cat([lv[i].expand(n) for lv, n in zip(levels, counts, strict=True)]) for i in range(3)))
