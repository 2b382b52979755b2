"""The objectives on MNIST at equal compute: the same net, batch and seconds of a processor for each, the same judge.

    python bench/objectives.py --data PATH --work runs/objectives --seconds 180 --minutes 120

Each row trains a U-Net of 0.5 M weights for so many seconds of one thread's processor time (AdamW at a constant rate,
EMA 0.998, batch 64, bfloat16 where the processor has it): the time of an update is measured first, of all rows in
turn, and from it follows how many updates each has, so that what else the machine does makes no difference. Then it
draws 1,000 digits, as many of each class, by each of two deterministic samplers at about 50 asks, from the same
noise. The table shows the better of the two by FID and names it; the JSON has both. FID and KID are in the 64
features of the house's MNIST classifier, against all test images, beside those of 1,000 training images.

A row that is trained goes on where it stopped, and one that is judged is not judged again: run it as often as you like.
--minutes ends this call after so many minutes; --rows names some rows (so that two calls share them, one a core). One
seed a row: small differences say little.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from paces import paces

import inkdrop
from inkdrop.bundle import checkpoints
from inkdrop.errors import Diverged
from inkdrop.evals.features import features_for
from inkdrop.evals.score import score
from inkdrop.find import Part
from inkdrop.generate import sample
from inkdrop.recipe import Recipe, open_data, set_knobs
from inkdrop.recipes.mnist import mnist
from inkdrop.train.guard import NotFinite
from inkdrop.train.loop import choose
from inkdrop.train.trainer import Trainer

EDM = ("schedule=edm", "clock=lam", "scale=edm")
FLOW = ("schedule=flow", "target=flow", "clock=time")
HYBRID = ("target=eps", "loss=hybrid", "net.learned_variance=true")

ROWS: dict[str, tuple[str, ...]] = {
    "eps": ("target=eps",),
    "x0": ("target=x0",),
    "v": ("target=v",),
    "v, min-SNR 5": ("target=v", "loss.weight=min_snr"),
    "v, 1 on x0": ("target=v", "loss.weight=constant"),
    "eps, P2": ("target=eps", "loss.weight=p2"),
    "EDM": (*EDM, "target=edm", "loss.times=lognormal"),
    "flow": FLOW,
    "flow, logit-normal": (*FLOW, "loss.times=logit_normal"),
    "flow, optimal pairing": (*FLOW, "loss.pairing=optimal"),
    "score matching (NCSN)": (*EDM, "target=score", "loss.weight=snr", "loss.times=loguniform"),
    "hybrid": HYBRID,
    "v, spread": ("target=v", "train.draws=spread"),
    "hybrid, aware": (*HYBRID, "train.draws=aware"),
    "v, offset noise 0.1": ("target=v", "loss.offset=0.1"),
    "v, perturbed 0.1": ("target=v", "loss.perturb=0.1"),
}
BASE = (
    *("net=unet_mnist", "net.width=14", "loss=simple", "train.batch=64", "train.lr=2e-3", "train.decay=constant"),
    *("train.precision=auto", "train.null_rate=0", "train.steps=1000000000"),
)
SAMPLERS = {"dpmpp_2m": 50, "heun": 25}  # and its steps: 50 and 49 asks


def recipe_of(row: str, data: Path, seed: int) -> Recipe:
    return set_knobs(choose(mnist(), data=data), [*BASE, f"train.seed={seed}", *ROWS[row]])


def trained(recipe: Recipe, out: Path, updates: int, until: float) -> Trainer | None:
    """The trainer after so many updates, from its newest checkpoint; None if time is up before."""
    trainer = Trainer(recipe, out, device="cpu")
    if found := checkpoints(out):
        trainer.load(found[-1])
    while trainer.update < updates:
        began = time.process_time()
        try:
            trainer.step()
        except NotFinite:
            trainer.update += 1
        trainer.seconds += time.process_time() - began
        over = time.monotonic() > until
        if over or trainer.update % 500 == 0 or trainer.update == updates:
            trainer.save()
        if over:
            return None
    return trainer


def judged(trainer: Trainer, count: int, judge: Any, data: tuple[Any, Any]) -> dict[str, Any]:
    """The figures of each sampler's digits."""
    model, labels, found = trainer.bundle(), torch.arange(count) % 10, {}
    grid = {"grid": "karras"} if trainer.recipe.schedule.name == "edm" else {}
    for name, steps in SAMPLERS.items():
        try:
            x = sample(model, count, seed=0, sampler=name, steps=steps, label=labels, batch=250, **grid).clamp(-1, 1)
        except Diverged as error:
            found[name] = {"error": str(error)}
            continue
        got = score(x.split(250), *data, judge, labels=labels, held_out=100)
        right = got["classes"]
        found[name] = {key: got[key] for key in ("fid", "kid", "fid_floor", "kid_floor")} | {"classes": right}
    return found


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as Markdown."""
    lines = [
        "| objective | FID | KID ×1000 | sampler | updates | ms an update |",
        "| --- | ---: | ---: | --- | ---: | ---: |",
    ]
    for row in rows:
        sound = {name: got for name, got in row["samplers"].items() if "fid" in got}
        if not sound:
            lines.append(f"| {row['row']} | no finite samples | | | {row['updates']:,} | |")
            continue
        best, got = min(sound.items(), key=lambda item: item[1]["fid"])
        lines.append(
            f"| {row['row']} | {got['fid']:.1f} | {1000 * got['kid']['mean']:.2f} ± {1000 * got['kid']['se']:.2f} "
            f"| {best} | {row['updates']:,} | {1000 * row['pace']:.0f} |"
        )
    for floor in [got for row in rows for got in row["samplers"].values() if "fid" in got][:1]:
        kid = 1000 * floor["kid_floor"]["mean"]
        lines.append(f"| *as many training images* | {floor['fid_floor']:.1f} | {kid:.2f} | | | |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--data", type=Path, required=True, help="a folder with the four IDX files of MNIST")
    parser.add_argument("--work", type=Path, required=True, help="where rows are kept while they are made")
    parser.add_argument("--seconds", type=float, default=180, help="of a processor, that each row is trained")
    parser.add_argument("--minutes", type=float, default=1e6, help="after which this call ends")
    parser.add_argument("--samples", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rows", nargs="*", choices=list(ROWS), help="all by default")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "objectives.json")
    args = parser.parse_args()
    torch.set_num_threads(1)
    until = time.monotonic() + 60 * args.minutes
    data = tuple(open_data(Part("mnist", {"data": str(args.data)}), split) for split in ("train", "test"))
    judge, done = features_for(*data), []
    makers = {
        row: lambda row=row: Trainer(recipe_of(row, args.data, args.seed), None, device="cpu").step for row in ROWS
    }
    pace = paces(args.work / f"paces-{args.seed}.json", makers)
    for row, settings in ROWS.items():
        out = args.work / "".join(c if c.isalnum() else "-" for c in f"{row} {args.seconds:g} {args.seed}")
        verdict = out / f"judged-{args.samples}.json"
        wanted = not args.rows or row in args.rows
        if wanted and not verdict.exists() and time.monotonic() < until:
            recipe = recipe_of(row, args.data, args.seed)
            trainer = trained(recipe, out, max(1, round(args.seconds / pace[row])), until)
            if trainer is None:
                break
            got = {"row": row, "settings": [*BASE, *settings], "updates": trainer.update, "seconds": trainer.seconds}
            got["pace"] = pace[row]
            got["parameters"] = sum(p.numel() for p in trainer.denoiser.net.parameters())
            got["samplers"] = judged(trainer, args.samples, judge, data)
            verdict.write_text(json.dumps(got, indent=1) + "\n", encoding="utf-8")
            print(table([got]).split("\n")[2], flush=True)
        if verdict.exists():
            done.append(json.loads(verdict.read_text(encoding="utf-8")))
    about = {"inkdrop": inkdrop.__version__, "torch": str(torch.__version__), "python": platform.python_version()}
    about |= {"machine": platform.machine(), "threads": 1, "classifier": judge.hash, "seed": args.seed}
    command = f"python bench/objectives.py --data PATH --work runs/objectives --seconds {args.seconds:g}"
    record = {"command": command, **about, "samples": args.samples, "rows": done}
    args.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    args.out.with_suffix(".md").write_text(f"{table(done)}\n\n`{command}`\n", encoding="utf-8")
    print(table(done))


if __name__ == "__main__":
    main()
