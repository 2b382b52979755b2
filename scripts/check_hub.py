"""Compare our images with those of diffusers, from one noise, on published models: run it where the network allows.

    python scripts/check_hub.py                                  three models from the hub, about 8 GB
    python scripts/check_hub.py google/ddpm-cifar10-32           one of them
    python scripts/check_hub.py path/to/a/pipeline               a local folder

Each model is read by inkdrop and loaded by diffusers' own pipeline; both draw from the same noise in as many steps.
Prints PASS or FAIL with the largest difference of a pixel in [-1, 1], and exits with 1 if one fails. The largest model,
Stable Diffusion 1.5, needs 10 GB of memory in float32 for both, and minutes on a CPU.
"""

from __future__ import annotations

import argparse
import importlib
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from inkdrop.bundle import Bundle
from inkdrop.core.level import Level
from inkdrop.core.noise import Keyed
from inkdrop.errors import InkdropError
from inkdrop.generate import sample
from inkdrop.hub.fetch import located
from inkdrop.hub.read import read

__all__ = ["MODELS", "compare", "given_noise", "main", "their_images"]

MODELS = ("google/ddpm-cifar10-32", "facebook/DiT-XL-2-256", "stable-diffusion-v1-5/stable-diffusion-v1-5")
PROMPT = "a photograph of an astronaut riding a horse"

_DRAWING = (
    "diffusers.pipelines.ddpm.pipeline_ddpm",
    "diffusers.pipelines.ddim.pipeline_ddim",
    "diffusers.pipelines.deprecated.latent_diffusion_uncond.pipeline_latent_diffusion_uncond",
    "diffusers.pipelines.dit.pipeline_dit",
    "diffusers.schedulers.scheduling_ddpm",
    "diffusers.schedulers.scheduling_ddim",
)
_LOADED = {"torch_dtype": torch.float32, "safety_checker": None}
_NO_LEVEL = Level(*(torch.tensor(0.0, dtype=torch.float64) for _ in range(3)))


@contextmanager
def given_noise(seed: int, shape: tuple[int, ...]) -> Iterator[Tensor]:
    """Whatever noise a pipeline or a scheduler draws is that of our `sample` of this seed, in the order drawn.

    Args:
        seed: as in `inkdrop.sample`.
        shape: (B, C, H, W) of what is noised.
    """
    keyed, size = Keyed(seed, range(shape[0])), shape
    start = keyed.start(shape)
    queue = [start]

    def draw(shape: Sequence[int], **_: Any) -> Tensor:
        if tuple(shape) != size:
            raise ValueError(f"noise: diffusers asks for {tuple(shape)}, ours is {size}")
        return (queue.pop() if queue else keyed(start, _NO_LEVEL, _NO_LEVEL)).clone()

    patches = [patch.object(importlib.import_module(name), "randn_tensor", draw) for name in _DRAWING]
    for one in patches:
        one.start()
    try:
        yield start
    finally:
        for one in patches:
            one.stop()


def their_images(pipeline: Any, shape: tuple[int, ...], *, seed: int, steps: int, **how: Any) -> Tensor:
    """What a pipeline of theirs draws from our noise: (B, C, H, W) in [-1, 1].

    Args:
        pipeline: loaded.
        shape: (B, C, H, W) of what is noised.
        seed: of our noise.
        steps: of its scheduler.
        how: further arguments of its call; a prompt or class_labels has one for each image.
    """
    latent = type(pipeline).__name__ == "LDMPipeline"  # which knows arrays alone
    pipeline.set_progress_bar_config(disable=True)
    with given_noise(seed, shape) as start:
        told = {"latents": start} if "prompt" in how else {} if "class_labels" in how else {"batch_size": shape[0]}
        kind = "np" if latent else "pt"
        found = pipeline(**told, **how, num_inference_steps=steps, output_type=kind).images
    pictures = torch.as_tensor(found)
    return 2 * (pictures.permute(0, 3, 1, 2) if latent else pictures) - 1


def compare(
    source: str, *, count: int = 1, seed: int = 0, steps: int = 10, variant: str | None = None, prompt: str = PROMPT
) -> float:
    """The largest difference between our images and theirs, of [-1, 1].

    Args:
        source: a hub id or a folder.
        count: images.
        seed: of the noise.
        steps: a divisor of the model's timesteps: else their DDIM does not step as its timesteps say.
        variant: which weights, as "fp16", which both read as float32.
        prompt: for a model that reads.
    """
    import diffusers

    bundle = read(source, variant=variant)
    theirs: Any = diffusers.DiffusionPipeline
    pipeline = theirs.from_pretrained(located(source, variant=variant), **_LOADED, variant=variant)
    told, ours = _arguments(bundle, count, prompt)
    state = bundle.shape if bundle.codec is None else bundle.codec.latent_shape
    wanted = their_images(pipeline, (count, *state), seed=seed, steps=steps, **told)
    del pipeline
    found = sample(bundle, count, seed=seed, steps=steps, **ours).clamp(-1, 1)
    return float((found - wanted).abs().max())


def _arguments(bundle: Bundle, count: int, prompt: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """(their call's, ours): what the model is told, the same for both."""
    if bundle.reader is not None:
        return {"prompt": [prompt] * count}, {"text": prompt}
    if bundle.classes:
        labels = [i % len(bundle.classes) for i in range(count)]
        return {"class_labels": labels}, {"label": labels}
    clips = bundle.plan.sampler.name == "ddim" and bool(bundle.plan.guide)
    return ({"use_clipped_model_output": True} if clips else {}), {}


def main(argv: Sequence[str] | None = None) -> int:
    """Compare each model; the number that failed is not 0 if one did."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("sources", nargs="*", default=list(MODELS), help="hub ids or folders; by default three models")
    parser.add_argument("--count", type=int, default=1, help="images of each (1)")
    parser.add_argument("--steps", type=int, default=10, help="steps, a divisor of 1000 (10)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--variant", help="which weights, as fp16")
    parser.add_argument("--tolerance", type=float, default=0.01, help="largest difference that passes, of [-1, 1]")
    given = parser.parse_args(argv)
    failed = 0
    for source in given.sources:
        began = time.monotonic()
        try:
            gap = compare(source, count=given.count, seed=given.seed, steps=given.steps, variant=given.variant)
        except (InkdropError, OSError) as error:
            print(f"FAIL  {source}: {str(error).splitlines()[0]}")
            failed += 1
            continue
        good = gap <= given.tolerance
        failed += not good
        how = f"in {given.steps} steps, {time.monotonic() - began:.0f} s"
        print(f"{'PASS' if good else 'FAIL'}  {source}: largest difference {gap:.2g} {how}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
