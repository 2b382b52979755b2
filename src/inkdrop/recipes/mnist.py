"""MNIST."""

from __future__ import annotations

from inkdrop.find import Part
from inkdrop.plan import Plan
from inkdrop.recipe import Recipe
from inkdrop.settings import Train

__all__ = ["mnist"]


def mnist() -> Recipe:
    """28×28 MNIST digits by class: minutes on two CPU cores. Give --data, or --set data.download=true."""
    return Recipe(
        data=Part("mnist"),
        net=Part("unet_mnist"),
        loss=Part("simple", {"weight": "min_snr"}),
        train=Train(
            steps=6000,
            batch=64,
            lr=2e-3,
            warmup=100,
            ema=0.998,
            precision="auto",
            preview_every=1000,
            save_every=1000,
        ),
        plan=Plan(sampler=Part("unipc"), steps=16, guide=(Part("clip"), Part("cfg", {"scale": 1.0}))),
    )
