"""MNIST by a transformer."""

from __future__ import annotations

from dataclasses import replace

from inkdrop.find import Part
from inkdrop.recipe import Recipe
from inkdrop.recipes.mnist import mnist

__all__ = ["dit_mnist"]


def dit_mnist() -> Recipe:
    """28×28 MNIST digits by class with a DiT, at the computing time of `mnist`'s U-Net. Give --data."""
    return replace(mnist(), net=Part("dit_mnist"))
