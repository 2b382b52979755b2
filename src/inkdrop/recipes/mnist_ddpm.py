"""MNIST as DDPM is usually taught."""

from __future__ import annotations

from dataclasses import replace

from inkdrop.find import Part
from inkdrop.plan import Plan
from inkdrop.recipe import Recipe
from inkdrop.recipes.mnist import mnist
from inkdrop.settings import Train

__all__ = ["mnist_ddpm"]


def mnist_ddpm() -> Recipe:
    """28×28 MNIST digits as usually taught: eps, linear betas, 5 epochs of AdamW at 1e-4, 1,000 steps of DDPM."""
    train = Train(
        steps=5 * 60_000 // 128,
        batch=128,
        lr=1e-4,
        warmup=0,
        decay="constant",
        ema=0.0,
        null_rate=0.0,
        preview_every=1000,
        save_every=500,
    )
    plan = Plan(sampler=Part("ddpm"), steps=1000, guide=(Part("clip"),))
    return replace(mnist(), schedule=Part("linear"), target=Part("eps"), loss=Part("simple"), train=train, plan=plan)
