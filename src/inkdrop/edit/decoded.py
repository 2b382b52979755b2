"""Decoding: the last question of a sampling in latents, so that a batcher answers it like any other."""

from __future__ import annotations

import torch

from inkdrop.core.ask import Ask, Sampling
from inkdrop.core.level import Level

__all__ = ["decoded"]

_CLEAN = Level(*(torch.tensor(f, dtype=torch.float64) for f in (1.0, 0.0, 0.0)))


def decoded(sampling: Sampling) -> Sampling:
    """The sampling, and then one question for the picture under its latent: x0 of the part "decode".

    Put round everything else: guidance has nothing to say about it. Cost: one ask more, of the autoencoder's decoder.

    Args:
        sampling: of latents (B, c, h, w).

    Reference: Rombach et al. 2022, section 3.1.
    """
    latent = yield from sampling
    belief = yield Ask(latent, _CLEAN, None, of="decode")
    return belief.x0
