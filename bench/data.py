"""How fast data sets feed: images/s of a folder, a zip, tar shards and parquet, beside what a net consumes.

    python bench/data.py --out bench/results                 2,000 PNGs of 32×32 and of 64×64, batches of 64
    python bench/data.py --net 32=400 --net 64=90            and the multiple of what a net takes, in images/s, by side
    python bench/data.py --train                             only what a trainer does: ms an update, by train.workers
    python bench/data.py --quick                             400 images, one round

The pictures are RGB, smooth with a little noise, so that they compress about as photographs do. Every source holds the
same pictures and decodes each one each time (the folder's and the zip's cache is off); batches are in the order of
training (a permutation). `processor` is images for each second of processor time of one thread, in which other work on
the machine counts less. `1 thread` is the same by the clock; `2 workers`, by the clock too, is through Prefetch while
the main thread does nothing else, which is the most that it can feed. Sources are interleaved; medians over rounds. The
files were just written, so they come from the page cache: this is the cost of finding, reading and decoding, not that
of a disk.
"""

from __future__ import annotations

import argparse
import io
import itertools
import json
import os
import platform
import shutil
import statistics
import sys
import tarfile
import tempfile
import time
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from inkdrop.codec import Codec, save_codec
from inkdrop.core.dataset import Data
from inkdrop.data.folder import folder
from inkdrop.data.parquet import parquet
from inkdrop.data.shards import shards
from inkdrop.find import Part
from inkdrop.plan import Plan
from inkdrop.recipe import Recipe
from inkdrop.settings import Train
from inkdrop.train.order import rows_of
from inkdrop.train.prefetch import Prefetch
from inkdrop.train.trainer import Trainer


def picture(side: int, number: int) -> bytes:
    """A PNG of smooth colour and a little noise."""
    draws = np.random.default_rng(number)
    coarse = Image.fromarray(draws.integers(0, 256, (4, 4, 3), dtype=np.uint8)).resize((side, side), Image.BICUBIC)
    pixels = np.clip(np.asarray(coarse) + draws.normal(0, 3, (side, side, 3)), 0, 255).astype(np.uint8)
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "PNG")
    return out.getvalue()


def sources(root: Path, side: int, count: int) -> dict[str, Data]:
    """The same pictures in four kinds of place."""
    made = {f"{number:06d}.png": picture(side, number) for number in range(count)}
    (root / "folder").mkdir(parents=True)
    (root / "shards").mkdir()
    with zipfile.ZipFile(root / "all.zip", "w") as packed:
        for name, data in made.items():
            (root / "folder" / name).write_bytes(data)
            packed.writestr(name, data)
    names = list(made)
    for part in range(4):
        with tarfile.open(root / "shards" / f"{part}.tar", "w") as tar:
            for name in names[part::4]:
                member = tarfile.TarInfo(name)
                member.size = len(made[name])
                tar.addfile(member, io.BytesIO(made[name]))
    import datasets

    datasets.disable_progress_bars()
    table = datasets.Dataset.from_dict(
        {"image": [{"bytes": data, "path": None} for data in made.values()]},
        features=datasets.Features({"image": datasets.Image()}),
    )
    table.to_parquet(str(root / "all.parquet"))
    return {
        "folder": folder("train", data=root / "folder", cache=False, holdout=0),
        "zip": folder("train", data=root / "all.zip", cache=False, holdout=0),
        "tar shards": shards("train", data=root / "shards", holdout=0),
        "parquet": parquet("train", data=root / "all.parquet", holdout=0),
    }


def rate(data: Data, batch: int, updates: int, workers: int) -> tuple[float, float]:
    """Images a second over so many batches, of the clock and of processor time."""

    def make(update: int) -> torch.Tensor:
        return data.take(rows_of(update, batch, len(data), 0))[0]

    with Prefetch(make, workers=workers, last=updates) as batches:
        began, used = time.perf_counter(), time.process_time()
        for update in range(updates):
            batches.take(update)
        images = batch * updates
        return images / (time.perf_counter() - began), images / (time.process_time() - used)


def training(root: Path, count: int, rounds: int) -> list[dict[str, Any]]:
    """Milliseconds an update of a small net on a folder of 64×64, each batch made in its turn or by threads beside it.

    Of latents too, that are kept on disk or made at every update; medians over all updates but the first three.
    """
    sources(root / "train", 64, count)
    codec = Codec(Part("autoencoder", {"latent": 4, "width": 16, "multipliers": [1, 2], "blocks": 1}), (3, 64, 64))
    save_codec(codec, root / "codec")
    net = Part("unet", {"width": 16, "multipliers": [1, 2], "blocks": 1, "middle_attention": False})
    data = Part("folder", {"data": str(root / "train" / "folder"), "cache": False})
    took: dict[tuple[str, int], list[float]] = {}
    for _, kind, workers in itertools.product(range(rounds), _KINDS, (0, 1, 2)):
        train = Train(batch=16, workers=workers, **_KINDS[kind])
        recipe = Recipe(data=data, net=net, train=train, plan=Plan(steps=1, guide=()))
        recipe = recipe if kind == "pictures" else replace(recipe, codec=str(root / "codec"))
        trainer, at = Trainer(recipe, None), list[float]()
        with trainer.ahead.running(12):
            for _ in range(12):
                trainer.step()
                at.append(time.perf_counter())
        took.setdefault((kind, workers), []).extend(b - a for a, b in itertools.pairwise(at[2:]))
    rows = []
    print("| what is trained on | 0 workers | 1 worker | 2 workers |\n| --- | --- | --- | --- |")
    for kind in _KINDS:
        times = [round(1e3 * statistics.median(took[kind, workers]), 1) for workers in (0, 1, 2)]
        print(f"| {kind} | " + " | ".join(f"{ms} ms" for ms in times) + " |")
        rows.append({"kind": kind, "ms": times})
    return rows


_KINDS: dict[str, dict[str, Any]] = {"pictures": {}, "kept latents": {}, "latents made anew": {"cache": False}}


def check(found: dict[str, Data]) -> None:
    """Every source gives the same pictures, by name or row."""
    expected = found["folder"].take([3, 100])[0]
    for name, data in found.items():
        ends = ("000003.png", "row 3"), ("000100.png", "row 100")
        rows = [next(row for row in range(len(data)) if data.name(row).endswith(end)) for end in ends]
        torch.testing.assert_close(data.take(rows)[0], expected, rtol=0, atol=0, msg=name)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--net", action="append", default=[], help="SIDE=IMAGES_A_SECOND that a net consumes")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--count", type=int, default=2000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--train", action="store_true", help="only a trainer's updates, by train.workers")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    count, rounds = (400, 1) if args.quick else (args.count, args.rounds)
    nets = {int(side): float(speed) for side, speed in (text.split("=") for text in args.net)}
    torch.set_num_threads(1)
    rows, updates = [], max(2, count // args.batch)
    root = Path(tempfile.mkdtemp())
    os.environ["INKDROP_CACHE"] = str(root / "cache")
    try:
        if args.train:
            training(root, min(count, 200), min(rounds, 2))
            return
        for side in (32, 64):
            found = sources(root / str(side), side, count)
            check(found)
            seen: dict[tuple[str, int], list[tuple[float, float]]] = {}
            for _ in range(rounds):
                for name, data in found.items():
                    for workers in (0, 2):
                        seen.setdefault((name, workers), []).append(rate(data, args.batch, updates, workers))
            for name in found:
                one, two = (round(statistics.median(wall for wall, _ in seen[name, workers])) for workers in (0, 2))
                own = round(statistics.median(cpu for _, cpu in seen[name, 0]))
                facts = {"processor": own, "one": one, "two": two, "net": nets.get(side)}
                rows.append({"side": side, "source": name, **facts})
    finally:
        shutil.rmtree(root)
    report(rows, args.out)


def report(rows: list[dict[str, Any]], out: Path | None) -> None:
    """The table, and a JSON beside its command and machine."""
    print("| pictures | source | processor | 1 thread | 2 workers | processor, of a net's need |")
    print("| --- | --- | --- | --- | --- | --- |")
    for row in rows:
        side, need = f"{row['side']}×{row['side']}", f"{row['processor'] / row['net']:.1f}×" if row["net"] else ""
        print(f"| {side} | {row['source']} | {row['processor']:,} | {row['one']:,} | {row['two']:,} | {need} |")
    if out is not None:
        about = {
            "command": "python " + " ".join(sys.argv),
            "python": platform.python_version(),
            "torch": torch.__version__,
            "cores": os.cpu_count(),
            "load": os.getloadavg(),
            "rows": rows,
        }
        out.mkdir(parents=True, exist_ok=True)
        (out / "data.json").write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
