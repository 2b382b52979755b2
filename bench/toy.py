"""One toy comparison, run again: cosine against linear on the embedded digits, 10 steps; does the score still come out?

    python bench/toy.py             run it, under 2 minutes; exit code 1 if it is outside the interval of toy.json
    python bench/toy.py --state     five seeds: write bench/results/toy.json, which states the intervals

Two trainings of `digits` (300 updates), 360 samples each by DDIM in 10 steps from the same noise: cosine's KID, and by
how much linear's is above it. The intervals are where one more training comes out in 99 of 100 cases, by what five
seeds did: mean ± t·s·√(1 + 1/5). So another machine, which rounds otherwise and so trains another model, comes out
within them.
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
from inkdrop.evals.kid import kid
from inkdrop.generate import sample
from inkdrop.train.loop import choose, fit
from inkdrop.train.record import write_atomically

STATED = Path(__file__).resolve().parent / "results" / "toy.json"
COUNT, UPDATES, SEEDS = 360, 300, 5


def scores(seed: int) -> dict[str, float]:
    """1,000 · KID of trainings of this seed: of cosine, and of linear minus cosine."""
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
        found[schedule] = 1000 * kid(judge(x), real).mean
    print(f"seed {seed}: KID × 1000 linear {found['linear']:.1f}, cosine {found['cosine']:.1f}", flush=True)
    return {"cosine": found["cosine"], "linear - cosine": found["linear"] - found["cosine"]}


def interval(values: list[float]) -> dict[str, Any]:
    """Where one more value lies in 99 of 100 cases."""
    mean, spread = statistics.mean(values), statistics.stdev(values)
    reach = t_quantile(0.995, len(values) - 1) * spread * math.sqrt(1 + 1 / len(values))
    return {"values": values, "mean": mean, "low": mean - reach, "high": mean + reach}


def state() -> dict[str, Any]:
    """The intervals, from five seeds."""
    rows = [scores(seed) for seed in range(1, SEEDS + 1)]
    about = {"command": "python bench/toy.py --state", "inkdrop": inkdrop.__version__, "torch": str(torch.__version__)}
    about |= {"python": platform.python_version(), "machine": platform.machine(), "threads": torch.get_num_threads()}
    what = f"KID x 1000 of {COUNT} samples, DDIM 10 steps, {UPDATES} updates"
    return {**about, "what": what, "scores": {name: interval([row[name] for row in rows]) for name in rows[0]}}


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--state", action="store_true", help="write the intervals instead")
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.state:
        write_atomically(STATED, state())
        return 0
    known, failed = json.loads(STATED.read_text(encoding="utf-8")), 0
    for name, found in scores(0).items():
        low, high = known["scores"][name]["low"], known["scores"][name]["high"]
        failed += not low <= found <= high
        verdict = "ok" if low <= found <= high else "OUTSIDE"
        print(f"{name}: {found:.1f}, stated {low:.1f} to {high:.1f}: {verdict}")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
