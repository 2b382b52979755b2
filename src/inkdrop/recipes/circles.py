"""Drawn circles."""

from __future__ import annotations

from inkdrop.find import Part
from inkdrop.recipe import Recipe
from inkdrop.settings import Train

__all__ = ["circles"]


def circles() -> Recipe:
    """Drawn circles, 32×32 grey: the smallest run on images of any size; DDPM's linear table, a net of two levels."""
    return Recipe(
        data=Part("circles"),
        net=Part("unet_tiny"),
        schedule=Part("linear"),
        loss=Part("simple", {"weight": "min_snr"}),
        train=Train(steps=2560, batch=16, lr=1e-3, ema=0.995, preview_every=640, save_every=640),
    )
