"""A DiT beside a U-Net on MNIST, at equal processor time: held-out loss and FID.

    python bench/dit_mnist.py --data PATH --minutes 8 --lr 0.004 --out bench/results/dit_mnist.json

The nets of the recipes `mnist` and `dit_mnist` with the settings below, on one thread. First the processor time of an
update is taken of both, in turn; from it follows how many updates each has in its minutes, and the learning rate
falls over just these. Then both are trained in turn, the next update always being of the one that is less far, so
that other work on the machine slows both alike. The clock is that of the processor (time.process_time). Scored are
the averaged weights: the loss on held-out images at fixed times and noise, whole and in fifths of the time from clean
to noise, and 5,000 samples by UniPC at 12 steps without guidance.

    python bench/dit_mnist.py --data PATH --minutes 1.5 --lr 0.001 --lr 0.002 --lr 0.004 --out rates.json

trains each with each learning rate and gives the losses alone: how the rate above was chosen.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

import inkdrop
from inkdrop.bundle import save
from inkdrop.eval_jobs import score_bundle
from inkdrop.plan import change
from inkdrop.recipe import Recipe
from inkdrop.screen import Screen
from inkdrop.train.held_out import held_out_loss
from inkdrop.train.loop import choose
from inkdrop.train.trainer import Trainer

RECIPES = ("mnist", "dit_mnist")
SETTINGS = ("loss=simple", "train.batch=128", "train.warmup=200", "train.precision=float32")


def pace(recipes: dict[str, Recipe], updates: int = 8) -> dict[str, float]:
    """Seconds of the processor an update, by recipe: medians over updates in turn, the first two left out."""
    trainers = {name: Trainer(recipe, None) for name, recipe in recipes.items()}
    taken: dict[str, list[float]] = {name: [] for name in trainers}
    for _ in range(updates + 2):
        for name, trainer in trainers.items():
            began = time.process_time()
            trainer.step()
            taken[name].append(time.process_time() - began)
    return {name: statistics.median(each[2:]) for name, each in taken.items()}


def train(recipes: dict[str, Recipe]) -> tuple[dict[str, Trainer], dict[str, float], dict[str, list[float]]]:
    """Trained runs, the seconds of the processor that each has had, and the losses of all updates."""
    trainers = {name: Trainer(recipe, None) for name, recipe in recipes.items()}
    spent, losses = dict.fromkeys(trainers, 0.0), {name: list[float]() for name in trainers}
    share = dict.fromkeys(trainers, 0.0)
    while min(share.values()) < 1:
        name = min(share, key=share.__getitem__)
        began = time.process_time()
        losses[name].append(trainers[name].step()["loss"])
        spent[name] += time.process_time() - began
        share[name] = trainers[name].update / recipes[name].train.steps
        if trainers[name].update % 100 == 0:
            print(f"{name} {share[name]:.0%} loss {statistics.mean(losses[name][-100:]):.4f}", flush=True)
    return trainers, spent, losses


def report(trainer: Trainer, spent: float, losses: list[float], count: int) -> dict[str, Any]:
    """The figures of a run, without those of its samples."""
    bundle = trainer.bundle()
    with torch.no_grad():
        held = held_out_loss(
            bundle.denoiser.eval(), trainer.loss, trainer.held_out, seed=0, device=trainer.device, count=count
        )
    return {
        "net": trainer.recipe.net.name,
        "parameters": bundle.card["parameters"],
        "lr": trainer.recipe.train.lr,
        "updates": trainer.update,
        "batch": trainer.recipe.train.batch,
        "processor seconds": round(spent, 1),
        "seconds an update": round(spent / trainer.update, 4),
        "training loss, last 100 updates": statistics.mean(losses[-100:]),
        "held out": held,
    }


def recipe_of(name: str, data: Path, lr: float | None) -> Recipe:
    """A recipe whose data are here, with another learning rate if one is given."""
    made = choose(name, data=data, settings=SETTINGS)
    return made if lr is None else replace(made, train=replace(made.train, lr=lr))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--data", type=Path, required=True, help="a folder with the four IDX files of MNIST")
    parser.add_argument("--minutes", type=float, default=8.0, help="of the processor, for each net")
    parser.add_argument("--lr", type=float, action="append", help="of both nets; several: losses alone")
    parser.add_argument("--samples", type=int, default=5000)
    parser.add_argument("--held-out", type=int, default=2000)
    parser.add_argument("--keep", type=Path, help="a folder for the trained models")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    rates = args.lr or [None]
    recipes = {
        name if len(rates) == 1 else f"{name} lr {lr:g}": recipe_of(name, args.data, lr)
        for name in RECIPES
        for lr in rates
    }
    seconds = pace({name: recipe_of(name, args.data, None) for name in RECIPES})
    print(f"seconds an update: {seconds}", flush=True)
    for name, made in recipes.items():
        steps = max(1, round(60 * args.minutes / seconds[name.partition(" ")[0]]))
        warmup = min(made.train.warmup, steps // 5)
        recipes[name] = replace(made, train=replace(made.train, steps=steps, warmup=warmup))
    trainers, spent, losses = train(recipes)
    rows = {}
    for name, trainer in trainers.items():
        rows[name] = report(trainer, spent[name], losses[name], args.held_out)
        print(name, json.dumps(rows[name]), flush=True)
        if args.keep is not None:
            save(trainer.bundle(), args.keep / name)
    if len(rates) == 1:
        with Screen() as screen:
            for name, trainer in trainers.items():
                bundle = trainer.bundle()
                plan = change(bundle.plan, sampler="unipc", steps=12)
                bundle = replace(bundle, recipe=replace(bundle.recipe, plan=plan))
                rows[name]["samples"] = score_bundle(bundle, args.samples, 0, None, screen)
    about = {"inkdrop": inkdrop.__version__, "torch": str(torch.__version__), "python": platform.python_version()}
    about |= {"machine": platform.machine(), "threads": torch.get_num_threads()}
    given = "".join(f" --lr {lr:g}" for lr in args.lr or [])
    command = f"python bench/dit_mnist.py --data PATH --minutes {args.minutes:g}{given}"
    if args.out is not None:
        record = {"command": command, **about, "rows": rows}
        args.out.write_text(json.dumps(record, indent=1, default=str).replace(str(args.data), "PATH") + "\n")


if __name__ == "__main__":
    main()
