"""Spread: the times of a batch, evenly spread."""

from __future__ import annotations

import torch
from torch import Tensor

from inkdrop.core.noise import Draw

__all__ = ["Spread"]

SHARED = 2**60 - 1
"""The place whose number shifts the times of all: the last there is, so no sample's own."""


class Spread(Draw):
    """A Draw whose times are evenly spread over the batch, so that its mean loss varies less.

    u_i = (u_0 + r(i)) mod 1, with u_0 one uniform number an update, and r(i) the radical inverse of place i in base 2:
    0, 1/2, 1/4, 3/4, 1/8, ... Each u_i is uniform on [0, 1) in itself, so the mean loss stays unbiased. The first 2^m
    places have one number in each interval of length 2^−m between u_0 and u_0 + 1, as in Kingma et al. 2021 (appendix
    I.1, r(i) = i/B); unlike theirs, a place's number does not depend on the size of the batch, nor on its split.
    """

    def uniform(self, stream: str = "time", count: int | None = None) -> Tensor:
        """Evenly spread times, (B,) or (B, count); other streams as ever."""
        if stream != "time":
            return super().uniform(stream, count)
        shift = Draw(self.seed, self.update, [SHARED]).uniform("time", count)
        own = torch.tensor([_radical_inverse(place) for place in self.places], dtype=torch.float64)
        return (shift + (own if count is None else own[:, None])) % 1


def _radical_inverse(place: int) -> float:
    """The binary digits of an integer, mirrored at the point (van der Corput 1935)."""
    return int(f"{place:b}"[::-1], 2) * 0.5 ** place.bit_length()
