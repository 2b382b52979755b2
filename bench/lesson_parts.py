"""What the lessons need besides: a data set without its classes, and a clock that stands still."""

from __future__ import annotations

import torch
from torch import Tensor

from inkdrop.core.dataset import Data
from inkdrop.core.level import Level
from inkdrop.data.arrays import Arrays
from inkdrop.find import Part
from inkdrop.recipe import open_data


def unlabelled(split: str, *, data: str = "") -> Data:
    """MNIST from a folder, or without one the embedded digits, of which nothing is told but the pixels.

    Args:
        split: "train" or "test".
        data: the folder of MNIST's IDX files.
    """
    whole = open_data(Part("mnist", {"data": data}) if data else Part("digits"), split)
    x = whole.take(range(len(whole)))[0]
    return Arrays(x, title=f"unlabelled {split}", source=whole.source, levels=whole.levels, preprocessing="unlabelled")


def blind(level: Level) -> Tensor:
    """A clock that always says 0: the net is not told how much noise there is."""
    return torch.zeros_like(level.t)
