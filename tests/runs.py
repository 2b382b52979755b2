"""Tiny runs for tests: recipes that train in a fraction of a second, and what to compare of two runs."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from inkdrop.bundle import Bundle
from inkdrop.core.cond import Terms
from inkdrop.find import Part
from inkdrop.plan import Plan
from inkdrop.recipe import Recipe, denoiser_of
from inkdrop.settings import Train

TIMING = ("seconds", "samples_per_second")  # the fields of stats.jsonl that no two runs share


def points(*, dropout: float = 0.0, count: int = 90, plan: Plan | None = None, **train: Any) -> Recipe:
    """Labelled points of a line and an MLP of some hundred weights: about 3 ms an update."""
    settings = {"steps": 24, "batch": 8, "warmup": 5, "log_every": 1, "preview_every": 8, "save_every": 8, "keep": 9}
    return Recipe(
        data=Part("mixture1d", {"count": count, "labelled": True}),
        net=Part("mlp", {"width": 8, "depth": 1, "dropout": dropout}),
        schedule=Part("cosine", {"steps": 100}),
        train=Train(**{**settings, **train}),
        plan=plan or Plan(steps=3, guide=()),
    )


def digits(**train: Any) -> Recipe:
    """8 × 8 digits and a U-Net of some 3,000 weights: about 15 ms an update."""
    recipe = points(**{"batch": 4, "steps": 6, "preview_every": 4, "save_every": 4, **train})
    net = Part("unet", {"width": 4, "multipliers": [1], "blocks": 1, "middle_attention": False})
    return replace(recipe, data=Part("digits"), net=net, plan=Plan(steps=3))


def untrained(recipe: Recipe, shape: tuple[int, ...], classes: tuple[str, ...] = (), *, seed: int = 0) -> Bundle:
    """A model whose every weight is random: fresh nets end in zeros, which would make anything equal."""
    denoiser = denoiser_of(recipe, shape, Terms(classes=len(classes))).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in denoiser.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return Bundle(recipe, denoiser, shape, classes)


def log_of(run: Path) -> list[dict[str, Any]]:
    """The lines of a run's stats.jsonl, without what is timing."""
    lines = [json.loads(line) for line in (run / "stats.jsonl").read_text(encoding="utf-8").splitlines()]
    return [{key: value for key, value in line.items() if key not in TIMING} for line in lines]


def files_of(checkpoint: Path) -> dict[str, bytes]:
    """The bytes of every tensor file of a checkpoint: weights, average and optimiser."""
    return {file.name: file.read_bytes() for file in sorted(checkpoint.glob("*.safetensors"))}
