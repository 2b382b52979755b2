"""Small handwritten digits."""

from __future__ import annotations

from inkdrop.find import Part
from inkdrop.plan import Plan
from inkdrop.recipe import Recipe
from inkdrop.settings import Train

__all__ = ["digits"]


def digits() -> Recipe:
    """8×8 handwritten digits by class, embedded in the package: minutes on two CPU cores."""
    return Recipe(
        data=Part("digits"),
        net=Part("unet_digits"),
        train=Train(steps=3000, batch=128, lr=3e-3, warmup=100, ema=0.998, preview_every=500, save_every=1000),
        plan=Plan(steps=50, guide=(Part("clip"), Part("cfg", {"scale": 1.0}))),
    )
