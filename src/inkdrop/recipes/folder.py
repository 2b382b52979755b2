"""Your own images."""

from __future__ import annotations

from inkdrop.find import Part
from inkdrop.recipe import Recipe
from inkdrop.settings import Train

__all__ = ["folder"]


def folder() -> Recipe:
    """A folder of your images: channels, size and classes are inferred. Give --data PATH."""
    return Recipe(
        data=Part("folder"),
        net=Part("unet", {"width": 32, "multipliers": (1, 2, 4), "attention": (2,)}),
        loss=Part("simple", {"weight": "min_snr"}),
        train=Train(
            steps=20_000,
            batch=64,
            lr=5e-4,
            warmup=500,
            ema=0.999,
            precision="auto",
            preview_every=500,
            save_every=1000,
        ),
    )
