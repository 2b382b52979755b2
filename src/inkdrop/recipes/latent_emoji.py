"""Emoji by caption, in the latents of an autoencoder."""

from __future__ import annotations

from inkdrop.find import Part
from inkdrop.plan import Plan
from inkdrop.recipe import Recipe
from inkdrop.settings import Train

__all__ = ["latent_emoji"]


def latent_emoji() -> Recipe:
    """Captioned emoji, 64×64, in latents of 4×16×16. Give --data and --codec; without a codec, in pixels.

    First: inkdrop autoencoder folder --data PATH --out AE. Then: inkdrop train latent_emoji --data PATH --codec AE.
    """
    net = {"width": 64, "multipliers": (1, 2, 2), "blocks": 1, "cross": (1, 2), "head_width": 32, "text_width": 128}
    return Recipe(
        data=Part("folder"),
        net=Part("unet", net),
        schedule=Part("flow"),
        target=Part("flow"),
        text=Part("bpe", {"vocabulary": 1024, "length": 24}),
        train=Train(steps=3000, batch=32, ema=0.998, precision="auto", preview_every=500, save_every=1000),
        plan=Plan(steps=30, guide=(Part("cfg", {"scale": 2.0}),)),
    )
