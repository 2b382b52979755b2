"""What windows and stages cost an update on 64×64 pictures, beside full pictures.

    python bench/frames.py --out bench/results/frames.json

Drawn scenes of 64×64, a U-Net of 16·(1, 2, 2) channels with attention at a quarter of the sides, batch 4, one thread.
Each frame of each run is timed alone, in milliseconds of the processor: the median of so many updates, the frames taken
in turns; memory is the planner's peak for pictures of that size (0: not measured). Means over a run are those of its
shares of updates.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

import inkdrop
from inkdrop.find import Part
from inkdrop.recipe import Recipe
from inkdrop.settings import Train
from inkdrop.train.dry import peak_memory
from inkdrop.train.frames import Frame
from inkdrop.train.trainer import Trainer

NET = {"width": 16, "multipliers": [1, 2, 2], "blocks": 1, "attention": [2]}
RUNS: dict[str, dict[str, Any]] = {
    "full pictures": {},
    "windows of 1/4 and 1/2, half of the updates full": {"windows": (0.25, 0.5), "full": 0.5},
    "stages: a quarter at 1/4, a quarter at 1/2": {"stages": ((4, 0.25), (2, 0.25))},
}


def trainer_of(size: int = 64, **how: Any) -> Trainer:
    train = Train(steps=1000, batch=4, warmup=0, null_rate=0, **how)
    recipe = Recipe(data=Part("shapes", {"size": size, "count": 64}), net=Part("unet", NET), train=train)
    return Trainer(recipe, None, device="cpu")


def timed(trainer: Trainer, update: int) -> float:
    trainer.update = update
    began = time.process_time()
    trainer.step()
    return time.process_time() - began


def measured(trainer: Trainer, repeats: int) -> list[dict[str, Any]]:
    """The frames of a run: its share of updates, milliseconds and MiB."""
    frames, first = trainer.feed.frames, trainer.feed.frames.trials()
    seen = [frames.at(update) for update in range(trainer.recipe.train.steps)]
    times: dict[Frame, list[float]] = {frame: [] for frame in first}
    for _ in range(repeats + 1):
        for frame, update in first.items():
            times[frame].append(timed(trainer, update))
    rows = []
    for frame in first:
        side = round(64 * frame.window / frame.factor)
        memory = peak_memory(trainer_of(side)) / 2**20 if side >= 32 else 0.0  # scenes have at least 32 pixels a side
        share = sum(other == frame for other in seen) / len(seen)
        ms = 1000 * statistics.median(times[frame][1:])
        rows.append({**frame._asdict(), "share": share, "ms": round(ms, 1), "MiB": round(memory, 1)})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    record: dict[str, Any] = {"command": f"python bench/frames.py --repeats {args.repeats}", "runs": {}}
    record |= {"inkdrop": inkdrop.__version__, "torch": str(torch.__version__), "machine": platform.machine()}
    for name, how in RUNS.items():
        rows = measured(trainer_of(**how), args.repeats)
        mean = sum(row["share"] * row["ms"] for row in rows)
        record["runs"][name] = {"frames": rows, "mean_ms": round(mean, 1), "peak_MiB": max(row["MiB"] for row in rows)}
        print(name, json.dumps(record["runs"][name]), flush=True)
    if args.out is not None:
        args.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
