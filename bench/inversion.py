"""How near a round trip comes: pictures inverted to noise and sampled back, by method, steps and guidance.

    python bench/inversion.py demo/runs/cosine --out bench/results/inversion.json

All held-out pictures of the run's data, told their own class in both directions. Decibels of the mean square error over
the range 2: of the mean over all pictures, and of the worst of them.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

import inkdrop
from inkdrop.bundle import Bundle
from inkdrop.drive import Step
from inkdrop.editing import decode, invert
from inkdrop.recipe import open_data

WAYS = [("naive", 100, 0), ("fixed-point", 100, 1), ("fixed-point", 50, 3), ("fixed-point", 100, 3), ("heun", 99, 0)]


def round_trip(model: Bundle, x: torch.Tensor, labels: list[int], method: str, steps: int, times: int, w: float) -> Any:
    """One row of the table."""
    asks = [0]

    def count(done: int, step: Step) -> None:
        asks[-1] += not step.level.clean

    how = {"label": labels, "guidance": w, "steps": steps, "method": method, "batch": len(x), "on_step": count}
    noise = invert(model, x, **({"iterations": times} if times else {}), **how)
    asks.append(0)
    error = (decode(model, noise, **how) - x).square().flatten(1).mean(1)
    row = {"method": method, "steps": steps, "iterations": times or None, "w": w, "up": asks[0], "back": asks[1]}
    decibels = [10 * math.log10(4 / float(e)) for e in (error.mean(), error.max())]
    return {**row, "dB": round(decibels[0], 1), "worst dB": round(decibels[1], 1)}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("--images", type=int, help="all held-out ones by default")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    model = inkdrop.load(args.run)
    data = open_data(model.recipe.data, "test")
    x, cond = data.take(range(min(len(data), args.images or len(data))))
    labels = cond.label.tolist()
    rows = []
    for w in (1.0, 2.0, 4.0):
        for method, steps, times in WAYS:
            rows.append(round_trip(model, x, labels, method, steps, times, w))
            print(" ".join(f"{name} {value}" for name, value in rows[-1].items() if value is not None), flush=True)
    about = {"images": len(x), "card": model.card, "inkdrop": inkdrop.__version__, "torch": str(torch.__version__)}
    about |= {"python": platform.python_version(), "machine": platform.machine(), "threads": torch.get_num_threads()}
    if args.out is not None:
        record = {"command": f"python bench/inversion.py {args.run}", **about, "rows": rows}
        args.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
