"""One toy comparison, run again: cosine against linear on the embedded digits, 10 steps; does the score still come out?

    python bench/toy.py             run it, under 2 minutes; exit code 1 if it is outside the interval of toy.json
    python bench/toy.py --state     five seeds: write bench/results/toy.json, which states the interval

Two trainings of `digits` (300 updates), 360 samples each by DDIM in 10 steps from the same noise, and by how much
linear's KID is above cosine's. The interval is where one more training comes out in 99 of 100 cases, by what five seeds
did: mean ± t·s·√(1 + 1/5). So another machine, which rounds otherwise and so trains another model, comes out within it.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import statistics
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

import inkdrop
from inkdrop.data.digits import digits
from inkdrop.evals.classifier import classifier
from inkdrop.evals.interval import t_quantile
from inkdrop.evals.mmd import CUBIC, mmd
from inkdrop.generate import sample
from inkdrop.train.loop import choose, fit
from inkdrop.train.record import write_atomically

STATED = Path(__file__).resolve().parent / "results" / "toy.json"
COUNT, UPDATES, SEEDS = 360, 300, 5


def gap(seed: int) -> float:
    """1,000 · (KID of linear − KID of cosine), of trainings of this seed."""
    train, test = digits("train"), digits("test")
    judge = classifier(train, test)
    real = judge(test.take(range(len(test)))[0])
    found = {}
    for schedule in ("linear", "cosine"):
        made = choose("digits", settings=(f"schedule={schedule}", f"train.seed={seed}"))
        made = replace(made, train=replace(made.train, steps=UPDATES, preview_every=UPDATES, save_every=UPDATES))
        with tempfile.TemporaryDirectory() as folder:
            model = fit(made, Path(folder) / "run")
        if model.card["updates"] < UPDATES:  # a signal ends a training in good order
            raise SystemExit("stopped in a training")
        x = sample(model, COUNT, seed=0, sampler="ddim", steps=10).clamp(-1, 1)
        found[schedule] = 1000 * mmd(judge(x), real, CUBIC).value
    print(f"seed {seed}: KID × 1000 linear {found['linear']:.1f}, cosine {found['cosine']:.1f}", flush=True)
    return found["linear"] - found["cosine"]


def state() -> dict[str, Any]:
    """The interval, from five seeds."""
    values = [gap(seed) for seed in range(1, SEEDS + 1)]
    mean, spread = statistics.mean(values), statistics.stdev(values)
    reach = t_quantile(0.995, SEEDS - 1) * spread * math.sqrt(1 + 1 / SEEDS)
    about = {"command": "python bench/toy.py --state", "inkdrop": inkdrop.__version__, "torch": str(torch.__version__)}
    about |= {"python": platform.python_version(), "machine": platform.machine(), "threads": torch.get_num_threads()}
    what = "1,000 · (KID of linear − KID of cosine), 360 samples, DDIM 10 steps, 300 updates"
    return {**about, "what": what, "values": values, "mean": mean, "low": mean - reach, "high": mean + reach}


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--state", action="store_true", help="write the interval instead")
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.state:
        write_atomically(STATED, state())
        return 0
    known = json.loads(STATED.read_text(encoding="utf-8"))
    found = gap(0)
    within = known["low"] <= found <= known["high"]
    stated = f"stated {known['low']:.1f} to {known['high']:.1f}: {'ok' if within else 'OUTSIDE'}"
    print(f"{known['what']}: {found:.1f}, {stated}")
    return 0 if within else 1


if __name__ == "__main__":
    sys.exit(main())
