"""PSNR: the peak signal-to-noise ratio of reconstructions."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["psnr"]


def psnr(x: Tensor, y: Tensor) -> Tensor:
    """The peak signal-to-noise ratio of each row in dB: 10·log10(4/mean (x − y)²): (B,); 4 is (1 − (−1))².

    At most 54.2 dB: a mean below the square of half a step of 8 bits, 1/255, counts as that, since no picture shows it.

    Args:
        x: (B, C, *S) in [-1, 1].
        y: (B, C, *S) in [-1, 1].
    """
    return 10 * torch.log10(4 / (x - y).square().flatten(1).mean(dim=1).clamp(min=255**-2))
