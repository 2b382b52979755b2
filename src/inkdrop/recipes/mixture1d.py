"""A one-dimensional mixture of Gaussians."""

from __future__ import annotations

from inkdrop.find import Part
from inkdrop.plan import Plan
from inkdrop.recipe import Recipe
from inkdrop.settings import Train

__all__ = ["mixture1d"]


def mixture1d() -> Recipe:
    """Points of the line from a mixture of Gaussians: seconds; the smallest diffusion model there is."""
    return Recipe(
        data=Part("mixture1d"),
        net=Part("mlp"),
        train=Train(steps=2000, batch=256, lr=1e-3, ema=0.995, preview_every=500, save_every=1000),
        plan=Plan(steps=50, guide=()),
    )
