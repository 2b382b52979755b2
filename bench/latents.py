"""The whole of latent diffusion beside diffusion in pixels, with the same net: time, memory and quality.

    inkdrop autoencoder folder --data PATH --out AE --max-steps 2500 --batch 8 --precision bfloat16
    python bench/latents.py --data PATH --codec AE --minutes 5 --out bench/results/latents.json

PATH is shared/data/noto-emoji/images: captioned emoji, 64×64. The recipe is `latent_emoji`, in three ways:

- latents: in latents of 4×16×16;
- pixels: the same net on 3×64×64;
- patches: the same net on 4×4 pixels seen as one, 48×16×16, which costs as much as latents.

Each figure comes from a process of its own on one thread. Seconds are of the processor (time.process_time), medians;
memory is the peak of the resident set over what it was before the first update or sample. Sampling is of 64 images at
once by the recipe's plan (30 steps, guidance 2), timed over `--timed` steps and multiplied where that is fewer, and the
decoding. Quality is after equal processor time of training: the distances (FID, KID) of 128 samples for held-out
captions (dpmpp_2m, 12 steps, no guidance) to the training images, in the features of a classifier of the eight groups
of emoji (the column "group"). FID of so few samples is too high, alike for all; KID has no such bias.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from torch import Tensor

import inkdrop
from inkdrop.bundle import load
from inkdrop.codec import load_codec
from inkdrop.core.cond import Cond
from inkdrop.evals.classifier import Classifier, classifier
from inkdrop.evals.frechet import Moments, frechet
from inkdrop.evals.kid import kid
from inkdrop.find import Part
from inkdrop.generate import sample
from inkdrop.recipe import Recipe, open_data
from inkdrop.recipes.latent_emoji import latent_emoji
from inkdrop.train.autoencoder import psnr, reconstruct
from inkdrop.train.trainer import Trainer

ARMS = ("latents", "pixels", "patches")


def recipe_of(arm: str, given: argparse.Namespace) -> Recipe:
    """The recipe of one way."""
    made = replace(latent_emoji(), data=Part("folder", {"data": str(given.data)}))
    if arm == "latents":
        return replace(made, codec=str(given.codec))
    return made if arm == "pixels" else replace(made, net=Part("unet", {**made.net.knobs, "patch": 4}))


def resident() -> float:
    """MiB now."""
    pages = int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[1])
    return pages * resource.getpagesize() / 2**20


def peak() -> float:
    """MiB at most so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


def update_cost(arm: str, given: argparse.Namespace) -> dict[str, Any]:
    """Seconds and memory of an update."""
    trainer = Trainer(recipe_of(arm, given), None, device="cpu")
    before, taken = resident(), []
    for _ in range(3 if arm == "pixels" else 12):
        began = time.process_time()
        trainer.step()
        taken.append(time.process_time() - began)
    return {
        "parameters": sum(p.numel() for p in trainer.denoiser.net.parameters()),
        "state": list(trainer.feed.shape),
        "update_s": round(statistics.median(taken[1:]), 3),
        "update_mib": round(peak() - before),
    }


def sample_cost(arm: str, given: argparse.Namespace) -> dict[str, Any]:
    """Seconds and memory of 64 images: the steps, and the decoding."""
    bundle = Trainer(recipe_of(arm, given), None, device="cpu").bundle()
    bundle.denoiser.eval()
    timed = min(given.timed if arm == "pixels" else bundle.plan.steps, bundle.plan.steps)
    before, began = resident(), time.process_time()
    sample(bundle, 64, batch=64, steps=timed)
    whole, most, decoding = time.process_time() - began, peak() - before, 0.0
    if bundle.codec is not None:
        z = torch.randn(64, *bundle.codec.latent_shape)
        began = time.process_time()
        with torch.no_grad():
            bundle.codec.decode(z)
        decoding = time.process_time() - began
    steps = (whole - decoding) * bundle.plan.steps / timed
    return {
        "steps_timed": timed,
        "steps_s": round(steps, 2),
        "decode_s": round(decoding, 2),
        "sample_64_s": round(steps + decoding, 2),
        "sample_64_mib": round(most),
    }


class Grouped:
    """The emoji that have a group, with it as their class.

    Args:
        split: "train" or "test".
        folder: with images and metadata.jsonl.
    """

    def __init__(self, split: str, folder: Path) -> None:
        self.data = open_data(Part("folder", {"data": str(folder)}), split)
        lines = (folder / "metadata.jsonl").read_text(encoding="utf-8").splitlines()
        groups = {entry["file_name"]: entry["group"] for entry in map(json.loads, lines)}
        own = [groups[Path(self.data.name(row)).name] for row in range(len(self.data))]
        self.classes = tuple(sorted({group for group in groups.values() if group}))
        self.rows = [row for row, group in enumerate(own) if group]
        self.labels = torch.tensor([self.classes.index(own[row]) for row in self.rows])
        self.shape, self.levels, self.source = self.data.shape, self.data.levels, f"{self.data.source}, by group"
        self.fingerprint = f"{self.data.fingerprint}-group"

    def __len__(self) -> int:
        return len(self.rows)

    def take(self, rows: Sequence[int]) -> tuple[Tensor, Cond | None]:
        """Images and their groups."""
        return self.data.take([self.rows[row] for row in rows])[0], Cond(label=self.labels[list(rows)])

    def name(self, row: int) -> str:
        """The file."""
        return self.data.name(self.rows[row])


class Judge:
    """Distances to the training images in the features of a classifier of groups."""

    def __init__(self, folder: Path) -> None:
        self.train, self.test = Grouped("train", folder), Grouped("test", folder)
        self.net: Classifier = classifier(self.train, self.test)
        self.real = self.net(self.train.data.take(range(len(self.train.data)))[0])

    def __call__(self, x: Tensor) -> dict[str, float]:
        """FID and KID of images."""
        made = self.net(x)
        one, other = (Moments(self.net.dim) for _ in range(2))
        one.update(made)
        other.update(self.real)
        near = kid(made, self.real)
        fid = frechet(one.mean, one.cov, other.mean, other.cov)
        return {"fid": round(fid, 2), "kid": round(near.mean, 4), "kid_se": round(near.se, 4)}


def draw(bundle: Any, given: argparse.Namespace, guidance: float = 1.0) -> Tensor:
    """Samples for held-out captions."""
    data = open_data(Part("folder", {"data": str(given.data)}), "test")
    texts = [text for text in getattr(data, "texts", None) or () if text]
    said = [texts[i % len(texts)] for i in range(given.samples)]
    return sample(bundle, given.samples, text=said, batch=32, sampler="dpmpp_2m", steps=12, guidance=guidance).clamp(
        -1, 1
    )


def quality(arm: str, given: argparse.Namespace) -> dict[str, Any]:
    """Distances after `minutes` of the processor."""
    recipe = recipe_of(arm, given)
    trainer = Trainer(recipe, None, device="cpu")
    began = time.process_time()
    for _ in range(2):
        trainer.step()
    each = (time.process_time() - began) / 2
    steps = max(5, round(60 * given.minutes / each))
    recipe = replace(recipe, train=replace(recipe.train, steps=steps, warmup=min(100, steps // 5)))
    trainer, began = Trainer(recipe, None, device="cpu"), time.process_time()
    losses = [trainer.step()["loss"] for _ in range(steps)]
    spent = time.process_time() - began
    held = trainer.held_out_loss(128)
    x = draw(trainer.bundle(), given)
    if given.pictures is not None:
        from inkdrop import picture

        given.pictures.mkdir(parents=True, exist_ok=True)
        picture.grid(x[:32]).save(given.pictures / f"{arm}.png")
    tail = statistics.mean(losses[-max(1, steps // 10) :])
    facts = {"updates": steps, "train_s": round(spent, 1), "loss": round(tail, 4), "held_out_loss": held["loss"]}
    return {**facts, **Judge(given.data)(x)}


def autoencoder(given: argparse.Namespace) -> dict[str, Any]:
    """What the autoencoder costs and loses."""
    codec, judge = load_codec(given.codec), Judge(given.data)
    train, test = judge.train.data, judge.test.data
    x = test.take(range(len(test)))[0]
    began = time.process_time()
    with torch.no_grad():
        for first in range(0, 256, 64):
            codec.encode(train.take(range(first, first + 64))[0])
    each = (time.process_time() - began) / 256
    y = reconstruct(codec, x)
    card = {name: codec.card[name] for name in ("updates", "batch", "hours", "parameters", "psnr_db", "latent_std")}
    return {
        **card,
        "encode_all_s": round(each * (len(train) + len(test)), 1),
        "images": len(train) + len(test),
        "psnr_held_out_db": round(float(psnr(x, y).mean()), 2),
        "classifier_accuracy": round(judge.net.accuracy, 3),
        "held_out_images": judge(x),
        "held_out_reconstructed": judge(y),
    }


def trained(given: argparse.Namespace) -> dict[str, Any]:
    """Distances of a whole run of the recipe, by guidance."""
    bundle, judge = load(given.run), Judge(given.data)
    rows = [{"guidance": w, **judge(draw(bundle, given, w))} for w in (1.0, 2.0, 4.0)]
    return {"updates": bundle.card["updates"], "hours": bundle.card["hours"], "guided": rows}


def alone(what: str, arm: str, given: argparse.Namespace) -> dict[str, Any]:
    """A figure from a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "facts.json"
        command = [sys.executable, __file__, *sys.argv[1:], "--what", what, "--arm", arm, "--out", str(out)]
        subprocess.run(command, check=True)
        facts: dict[str, Any] = json.loads(out.read_text(encoding="utf-8"))
    print(what, arm, json.dumps(facts), flush=True)
    return facts


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--codec", type=Path, required=True)
    parser.add_argument("--run", type=Path, help="a whole run of the recipe, to be scored too")
    parser.add_argument("--minutes", type=float, default=8.0, help="of the processor, for the training of each way")
    parser.add_argument("--timed", type=int, default=2, help="steps that are timed in pixels")
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--pictures", type=Path, help="folder for samples")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--what", default="all", help=argparse.SUPPRESS)
    parser.add_argument("--arm", default="latents", help=argparse.SUPPRESS)
    given = parser.parse_args()
    torch.set_num_threads(1)
    one = {"update": update_cost, "sample": sample_cost, "quality": quality}
    if given.what in one:
        facts = one[given.what](given.arm, given)
    elif given.what in ("autoencoder", "trained"):
        facts = (autoencoder if given.what == "autoencoder" else trained)(given)
    else:
        budget = f"--minutes {given.minutes:g} --samples {given.samples}" + (" --run RUN" if given.run else "")
        facts = {
            "command": f"python bench/latents.py --data PATH --codec AE {budget}",
            "inkdrop": inkdrop.__version__,
            "torch": str(torch.__version__),
            "python": platform.python_version(),
            "machine": platform.machine(),
            "threads": 1,
            "autoencoder": alone("autoencoder", "latents", given),
            "ways": {arm: {k: v for what in one for k, v in alone(what, arm, given).items()} for arm in ARMS},
        }
        facts |= {} if given.run is None else {"trained": alone("trained", "latents", given)}
    given.out.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
