"""Augmentation: what a recipe does to pictures at random before a net is trained on them."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from inkdrop.core.noise import Draw
from inkdrop.errors import BadArgument
from inkdrop.find import Part, check_knobs, find

__all__ = ["Augmentation"]

_BANK = 16
"""Numbers of the stream "augment" that each augmentation may draw, so that no two of them share any."""


class Augmentation:
    """Augmentations one after the other, each with numbers of its own.

    Args:
        parts: in the room "augmentations", in the order in which they are done.

    Raises:
        UnknownName: no such augmentation or knob.
        BadArgument: a value that does not fit, or one of them twice.
    """

    def __init__(self, parts: Sequence[Part]) -> None:
        names = [part.name for part in parts]
        if len(set(names)) != len(names):
            raise BadArgument(f"augment: got {', '.join(names)}; give each once")
        self._steps = []
        for part in parts:
            function = find("augmentations", part.name)
            self._steps.append(partial(function, **check_knobs(part.name, function, part.knobs)))

    def __call__(self, x0: Tensor, draw: Draw) -> tuple[Tensor, Tensor]:
        """The pictures (B, C, H, W) changed at random, and the numbers that a net is told of it, (B, K).

        Raises:
            BadShape: no pictures.
            BadArgument: a knob that does not fit them.
        """
        numbers = [x0.new_zeros(len(x0), 0, dtype=torch.float32)]
        for place, step in enumerate(self._steps):
            x0, own = step(x0, _Bank(draw, place * _BANK))
            numbers.append(own)
        return x0, torch.cat(numbers, dim=1)

    def told(self, shape: Sequence[int]) -> int:
        """K, how many numbers a net is told of pictures of this shape (C, H, W); 0 where it is told nothing."""
        return self(torch.zeros(1, *shape), Draw(0, 0, [0]))[1].shape[1] if self._steps else 0


class _Bank(Draw):
    """A Draw whose augmentation numbers begin further on in their stream."""

    def __init__(self, draw: Draw, first: int) -> None:
        super().__init__(draw.seed, draw.update, draw.places)
        self._first = first

    def uniform(self, stream: str = "time", count: int | None = None) -> Tensor:
        """The numbers of this bank; other streams as ever.

        Raises:
            BadArgument: more numbers than a bank has.
        """
        if stream != "augment" or count is None:
            return super().uniform(stream, count)
        if count > _BANK:
            raise BadArgument(f"augmentation: got {count} numbers a picture to draw, need at most {_BANK}")
        return super().uniform(stream, self._first + count)[:, self._first :]
