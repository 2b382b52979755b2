"""MNIST."""

from __future__ import annotations

from inkdrop.find import Part
from inkdrop.plan import Plan
from inkdrop.recipe import Recipe
from inkdrop.settings import Train

__all__ = ["mnist"]


def mnist() -> Recipe:
    """28×28 MNIST digits by class: 20 minutes on two CPU cores. Give --data, or --set data.download=true."""
    return Recipe(
        data=Part("mnist"),
        net=Part("unet_mnist"),
        train=Train(steps=3000, batch=128, lr=1e-3, warmup=200, ema=0.998, preview_every=500, save_every=500),
        plan=Plan(steps=50, guide=(Part("clip"), Part("cfg", {"scale": 1.0}))),
    )
