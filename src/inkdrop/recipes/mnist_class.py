"""MNIST, guided by class."""

from __future__ import annotations

from dataclasses import replace

from inkdrop.find import Part
from inkdrop.plan import Plan
from inkdrop.recipe import Recipe
from inkdrop.recipes.mnist import mnist

__all__ = ["mnist_class"]


def mnist_class() -> Recipe:
    """28×28 MNIST digits guided by class: the training of `mnist`, sampled with guidance. Give --data."""
    made = mnist()
    train = replace(made.train, null_rate=0.1)
    plan = Plan(sampler=Part("unipc"), steps=12, guide=(Part("clip"), Part("cfg", {"scale": 1.5})))
    return replace(made, train=train, plan=plan)
