"""Albums: tiny folders of pictures with classes, captions and attributes, recipes on them, and a codec of theirs."""

from __future__ import annotations

import csv
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from inkdrop.codec import Codec, save_codec
from inkdrop.find import Part
from inkdrop.plan import Plan
from inkdrop.recipe import Recipe
from inkdrop.train.trainer import Trainer
from runs import points

KINDS = ("dark", "light", "two")
COLOURS = ("red", "green", "blue")
NAMES = ("hue", "size")
SHAPE = (3, 8, 8)

BPE = Part("bpe", {"vocabulary": 280, "length": 16})
SMALL = {"width": 4, "multipliers": [1], "blocks": 1, "middle_attention": False}
READING = {**SMALL, "text_width": 8, "text_depth": 1, "text_heads": 2}


def album(folder: Path, *, count: int = 40, captions: bool = True, mode: str = "RGB", seed: int = 0) -> Path:
    """A folder of 8 × 8 pictures and a metadata.csv: kind, caption (empty in every fifth row), hue and size."""
    folder.mkdir(parents=True)
    random = np.random.default_rng(seed)
    with (folder / "metadata.csv").open("w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(["file_name", "kind", *(["text"] if captions else []), *NAMES])
        for i in range(count):
            pixels = random.integers(0, 256, (8, 8, 3), dtype=np.uint8)
            Image.fromarray(pixels).convert(mode).save(folder / f"{i:03d}.png")
            caption = "" if i % 5 == 4 else f"a {COLOURS[i % 3]} square, number {i}"
            values = [f"{i / count:.3f}", f"{-1 + i % 4 / 2:.1f}"]
            table.writerow([f"{i:03d}.png", KINDS[i % 3], *([caption] if captions else []), *values])
    return folder


def pictured(
    folder: Path,
    *,
    label: bool = False,
    text: bool = False,
    attributes: bool = False,
    image: Part | None = None,
    codec: Path | None = None,
    net: dict[str, Any] | None = None,
    plan: Plan | None = None,
    **train: Any,
) -> Recipe:
    """A recipe on an album and a U-Net of some thousand weights, told what is asked for."""
    knobs: dict[str, Any] = {"data": str(folder), "holdout": 0.25}
    knobs |= {"label": "kind"} if label else {}
    knobs |= {"attributes": list(NAMES)} if attributes else {}
    settings = {"batch": 4, "steps": 4, "preview_every": 4, "save_every": 2, **train}
    return replace(
        points(plan=plan or Plan(steps=2, guide=()), **settings),
        data=Part("folder", knobs),
        net=Part("unet", {**(READING if text else SMALL), **(net or {})}),
        text=BPE if text else None,
        image=image,
        codec=None if codec is None else str(codec),
    )


def shaken_run(recipe: Recipe, out: Path) -> Path:
    """A run whose weights begin at random, none at zero, so that all that it is told shows in what it draws."""
    trainer = Trainer(recipe, out, device="cpu")
    for net in (trainer.denoiser.net, trainer.ema.net):
        shake(net, by=0.2)
    out.mkdir()
    trainer.run()
    return out


TINY = Part("autoencoder", {"latent": 2, "width": 4, "multipliers": [1, 2], "blocks": 1})


def random_codec(shape: tuple[int, ...] = SHAPE, *, seed: int = 0, part: Part = TINY) -> Codec:
    """A codec with noise on every weight, of factor 2 and two channels."""
    made = Codec(part, shape, 0.1, 1.3)
    shake(made, seed=seed, by=0.2)
    return made.eval().requires_grad_(False)


def codec_folder(folder: Path, *, seed: int = 0, part: Part = TINY) -> Path:
    """The folder of such a codec."""
    save_codec(random_codec(seed=seed, part=part), folder)
    return folder


def shake(net: torch.nn.Module, *, seed: int = 0, by: float = 0.3) -> None:
    """Make every weight random: fresh nets end in zeros, which would make anything equal."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.copy_(by * torch.randn(parameter.shape, generator=generator))
