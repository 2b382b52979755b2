"""MNIST as DDPM is usually taught, beside what it could be: paces, floors, and what mirrored digits cost.

    inkdrop train mnist_ddpm --data PATH --out runs/taught
    inkdrop train mnist --data PATH --out runs/mnist
    python bench/headline.py --data PATH runs/taught runs/mnist

The paces are seconds of one core that an update of each recipe takes, measured in turns, so that "equal compute" can be
said of runs that were made beside other work. The floors are FID and KID of as many training images as there are
samples, as they are and with every second one mirrored, as the published recipe's flips teach a model to draw. Each
run is sampled by its own plan for 512 images, and for 10,000 by the same plan or, where that is 1,000 steps of DDPM, by
16 of UniPC. Everything is kept in --work, and writes bench/results/headline.json and .md.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from paces import paces
from torch import Tensor

from inkdrop.bundle import load
from inkdrop.evals.features import features_for
from inkdrop.evals.score import score
from inkdrop.evals.stream import subset
from inkdrop.find import Part
from inkdrop.generate import sample
from inkdrop.plan import change
from inkdrop.recipe import open_data
from inkdrop.train.loop import choose
from inkdrop.train.record import write_atomically
from inkdrop.train.trainer import Trainer

HERE = Path(__file__).resolve().parent
COUNTS = (512, 10_000)
KEPT = ("n", "fid", "fid_floor", "kid", "kid_floor", "classes", "classes_real", "warnings")


def kept(path: Path, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What is in this file, made first if it is not there."""
    if not path.exists():
        write_atomically(path, make())
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found


def mirrored(x: Tensor) -> Tensor:
    """The same with every second image mirrored."""
    return torch.where((torch.arange(len(x)) % 2 == 1)[:, None, None, None], x.flip(-1), x)


def row(name: str, got: dict[str, Any]) -> str:
    kid, floor = got["kid"], got["kid_floor"]["mean"]
    right = got["classes"]["agree"]
    cells = [name, f"{got['n']:,}", f"{got['fid']:.2f}", f"{got['fid_floor']:.2f}"]
    cells += [f"{1000 * kid['mean']:.1f} ± {1000 * kid['se']:.1f}", f"{1000 * floor:.1f}"]
    return f"| {' | '.join([*cells, '–' if right is None else f'{right:.1%}'])} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("runs", type=Path, nargs="*", help="run folders of the two recipes, or of others on MNIST")
    parser.add_argument("--data", type=Path, required=True, help="a folder with the four IDX files of MNIST")
    parser.add_argument(
        "--work", type=Path, default=Path("headline"), help="where figures are kept while they are made"
    )
    parser.add_argument("--counts", type=int, nargs="+", default=COUNTS)
    parser.add_argument("--out", type=Path, default=HERE / "results")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    train, test = (open_data(Part("mnist", {"data": str(args.data)}), split) for split in ("train", "test"))
    judge = features_for(train, test)
    makers = {
        name: lambda name=name: Trainer(choose(name, data=args.data), None, device="cpu").step
        for name in ("mnist_ddpm", "mnist")
    }
    pace, lines, record = paces(args.work / "paces.json", makers), [], []

    def figures(key: str, x: Callable[[], Tensor], labels: Tensor | None) -> None:
        def make() -> dict[str, Any]:
            began = time.process_time()
            made = x()
            spent = time.process_time() - began
            got = score(made.split(500), train, test, judge, labels=labels)
            return {"key": key, "sampling": round(spent, 1), **{name: got[name] for name in KEPT}}

        record.append(kept(args.work / f"{key.replace(' ', '-').replace(',', '')}.json", make))
        lines.append(row(key.rpartition(", ")[0], record[-1]))
        print(lines[-1], flush=True)

    for count in args.counts:
        rows = subset(len(train), count, seed=0, draw=3)
        figures(f"training images, {count}", lambda rows=rows: train.take(rows)[0], None)
        figures(
            f"training images half of them mirrored, {count}", lambda rows=rows: mirrored(train.take(rows)[0]), None
        )
        for run in args.runs:
            bundle = load(run)
            plan = bundle.plan
            if count > 512 and plan.steps == 1000:
                plan = change(plan, sampler="unipc", steps=16)
            bundle = replace(bundle, recipe=replace(bundle.recipe, plan=plan))
            labels = torch.arange(count) % 10
            draw = lambda b=bundle, n=count: sample(b, n, seed=0, batch=250).clamp(-1, 1)  # noqa: E731
            figures(f"{run.name} by {plan.sampler.name} {plan.steps}, {count}", draw, labels)
    updates = {run.name: load(run).card["updates"] for run in args.runs}
    heads = ["images", "N", "FID", "of real images", "KID × 1000", "of real images", "as asked"]
    text = [f"| {' | '.join(heads)} |", f"|{' --- |' * len(heads)}", *lines, ""]
    text += [f"Seconds of one core an update: mnist_ddpm {pace['mnist_ddpm']:.3f}, mnist {pace['mnist']:.3f}."]
    text += [f"Updates: {', '.join(f'{name} {count:,}' for name, count in updates.items())}."] if updates else []
    command = f"python bench/headline.py --data PATH {' '.join(f'runs/{run.name}' for run in args.runs)}".rstrip()
    args.out.mkdir(parents=True, exist_ok=True)
    facts = {"command": command, "paces": pace, "updates": updates, "features": judge.hash, "rows": record}
    write_atomically(args.out / "headline.json", facts)
    (args.out / "headline.md").write_text("\n".join([*text, "", f"`{command}`", ""]), encoding="utf-8")


if __name__ == "__main__":
    main()
