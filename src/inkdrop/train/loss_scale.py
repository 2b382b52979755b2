"""The factor on the loss that keeps float16 gradients from vanishing, and finds itself."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["LossScale"]


@dataclass
class LossScale:
    """A power of two by which the loss is multiplied before, and the gradient divided after, the backward pass.

    It halves when the gradient overflows, and the update is computed again, so that no update is lost to it; it doubles
    after `interval` updates in a row without.

    Attributes:
        scale: the factor, ≥ 1.
        good: updates since it last changed.
        interval: updates after which it doubles, ≥ 1.

    Reference: Micikevicius et al. 2018, section 3.2.
    """

    scale: float = 65536.0
    good: int = 0
    interval: int = 2000

    def divide(self, gradients: Iterable[Tensor]) -> None:
        """Take the factor off the gradients, in place."""
        torch._foreach_mul_(list(gradients), 1 / self.scale)

    def back_off(self) -> bool:
        """Halve the factor after an overflow; False if it is 1 already, so that halving it would not help."""
        if self.scale <= 1:
            return False
        self.scale, self.good = self.scale / 2, 0
        return True

    def grow(self) -> None:
        """Note an update without overflow."""
        self.good += 1
        if self.good >= self.interval:
            self.scale, self.good = self.scale * 2, 0
