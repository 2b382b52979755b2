"""Text-to-image on drawn scenes."""

from __future__ import annotations

from inkdrop.find import Part
from inkdrop.plan import Plan
from inkdrop.recipe import Recipe
from inkdrop.settings import Train

__all__ = ["shapes_text"]


def shapes_text() -> Recipe:
    """Drawn shapes by caption, 32×32: text-to-image from scratch in less than half an hour of one CPU core."""
    net = {"width": 32, "multipliers": (1, 2, 2), "blocks": 1, "patch": 2, "cross": (1, 2), "head_width": 32}
    return Recipe(
        data=Part("shapes"),
        net=Part("unet", {**net, "text_width": 128}),
        schedule=Part("flow", {"shift": 4.0}),
        target=Part("flow"),
        text=Part("bpe", {"vocabulary": 384, "length": 24}),
        train=Train(
            steps=6000,
            batch=32,
            lr=1.5e-3,
            warmup=300,
            precision="auto",
            preview_every=1000,
            save_every=500,
            keep=4,
        ),
        plan=Plan(steps=30, guide=(Part("clip"), Part("cfg", {"scale": 3.0}))),
    )
