"""What a run would be, without running it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from inkdrop.recipe import Recipe
from inkdrop.train.loop import check_latents
from inkdrop.train.trainer import Trainer

__all__ = ["dry_run"]


def dry_run(recipe: Recipe, device: str = "cpu", *, trust: bool = False) -> dict[str, Any]:
    """The data, the parameters and the memory of a recipe, from one forward pass of two samples.

    Memory in bytes: weights, gradients, AdamW's two moments and the average are 20 bytes a float32 parameter;
    activations are what one backward pass keeps, measured for two samples and scaled to the batch.

    Raises:
        InkdropError: whatever training would have raised at its start.
    """
    check_latents(recipe)
    trainer = Trainer(recipe, None, device=device, trust=trust)
    parameters = sum(p.numel() for p in trainer.denoiser.parameters())
    kept: dict[int, int] = {}

    def keep(t: Tensor) -> Tensor:
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    own = {p.untyped_storage().data_ptr() for p in trainer.denoiser.parameters()}
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        trainer.losses(rows=range(2))["loss"].mean().backward()
    activations = sum(size for place, size in kept.items() if place not in own) / 2
    return {
        "data": trainer.data.source,
        "samples": len(trainer.data),
        "held_out": len(trainer.held_out),
        "shape": trainer.data.shape,
        "classes": trainer.data.classes,
        "terms": trainer.feed.terms._asdict(),
        "state_shape": trainer.feed.shape,
        "parameters": parameters,
        "bytes_fixed": 20 * parameters,
        "bytes_activations": int(activations * recipe.train.batch),
        "epochs": recipe.train.steps * recipe.train.batch / max(1, len(trainer.data)),
    }
