"""How often a text-to-image model draws what its prompt says: 200 unseen prompts with one thing and 200 with two.

    python bench/shapes_text.py runs/shapes --out bench/results/shapes_text.json

The prompts are combinations that the training split of `shapes` never draws, every attribute said; as many that it
draws stand beside. Each sample is judged by a program (inkdrop.evals.scenes), at several guidance scales from the same
noise, and so are drawings of unseen combinations. Intervals are Wilson's, of 95 %.
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

import inkdrop
from inkdrop.bundle import Bundle
from inkdrop.core.noise import generator
from inkdrop.data.captions import combinations, text_of
from inkdrop.data.scenes import shapes
from inkdrop.evals.scenes import Rate, judge, rates
from inkdrop.recipe import dump

KINDS = {"single": 1, "pair": 2}


def prompts(things: int, count: int, seed: int, split: str = "test") -> list[str]:
    """Some combinations of a split in words, drawn without replacement."""
    scenes = combinations(split, things)
    return [text_of(scenes[i]) for i in generator(seed, things, 0).permutation(len(scenes))[:count]]


def told(found: dict[str, Rate]) -> dict[str, Any]:
    """Rates as plain JSON."""
    return {name: {**rate._asdict(), "share": round(rate.right / rate.n, 4)} for name, rate in found.items()}


def row(model: Bundle, texts: list[str], guidance: float, args: argparse.Namespace) -> dict[str, Any]:
    """The rates of one list of prompts at one guidance scale."""
    began = time.process_time()
    x = inkdrop.sample(model, len(texts), text=texts, guidance=guidance, seed=args.seed, batch=100, **steps_of(args))
    return {"guidance": guidance, **told(rates(judge(x, texts))), "seconds": round(time.process_time() - began, 1)}


def steps_of(args: argparse.Namespace) -> dict[str, Any]:
    """What of the plan the command line changes."""
    return {} if args.steps is None else {"steps": args.steps}


def show(kind: str, found: dict[str, Any]) -> None:
    """One line for people."""
    parts = [f"{name} {100 * r['share']:5.1f} %" for name, r in found.items() if isinstance(r, dict)]
    whole = found["right"]
    print(f"{kind:16} {' '.join(parts)}  [{100 * whole['low']:.1f}, {100 * whole['high']:.1f}]", flush=True)


def drawings(pairs: float, count: int) -> dict[str, Any]:
    """The judge's rates on drawings of unseen combinations."""
    data = shapes("test", count=count, pairs=pairs)
    return told(rates(judge(data.take(range(count))[0], data.texts)))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("--count", type=int, default=200, help="prompts of each kind")
    parser.add_argument("--guidance", type=float, nargs="+", default=[1.0, 2.0, 3.0, 5.0])
    parser.add_argument("--steps", type=int, help="the plan's by default")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    model = inkdrop.load(args.run)
    result: dict[str, Any] = {}
    for kind, things in KINDS.items():
        own = drawings(float(things - 1), 1000)
        show(f"{kind}, drawn", own)
        lists = {
            "unseen": prompts(things, args.count, args.seed),
            "seen": prompts(things, args.count, args.seed, "train"),
        }
        result[kind] = {"judge_on_drawings": own, "prompts": lists["unseen"]}
        for split, texts in lists.items():
            result[kind][split] = [row(model, texts, w, args) for w in args.guidance]
            for found in result[kind][split]:
                show(f"{kind}, {split}, {found['guidance']:g}", found)
    about = {
        "card": model.card,
        "recipe": dump(model.recipe),
        "inkdrop": inkdrop.__version__,
        "torch": str(torch.__version__),
    }
    about |= {"python": platform.python_version(), "machine": platform.machine(), "threads": torch.get_num_threads()}
    if args.out is not None:
        how = f" --guidance {' '.join(f'{w:g}' for w in args.guidance)}" + (
            f" --steps {args.steps}" if args.steps else ""
        )
        record = {"command": f"python bench/shapes_text.py {args.run}{how}", **about, "rates": result}
        args.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
