"""What guidance buys and what it costs on MNIST: fidelity against diversity, by guidance scale.

    inkdrop train mnist_class --data PATH --out runs/mnist
    python bench/guidance_mnist.py runs/mnist --data PATH --out bench/results/guidance_mnist.json \\
        --plot docs/images/guidance-mnist.png

As many samples of each class at each scale w, from the same noise, by UniPC at 12 steps (x0 clipped). Judged by the
classifier that inkdrop trains on MNIST, in its 64 features:

- accuracy: the share of samples that it finds to be of the class that was asked for;
- FID against all test images, beside the same of as many training images (the floor: with few samples FID is biased);
- precision and recall (Kynkäänniemi et al. 2019, k = 3) against as many test images: the share of samples inside the
  neighbourhoods of real images, and of real images inside those of samples;
- spread: the mean distance of two samples of the same class, in pixels, over that of two test images.

Accuracy and precision are fidelity; recall and spread are diversity; FID sees both.
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
from torch import Tensor

import inkdrop
from inkdrop.bundle import load
from inkdrop.core.dataset import Data
from inkdrop.evals.classifier import Classifier
from inkdrop.evals.features import features_for
from inkdrop.evals.frechet import Moments, frechet
from inkdrop.find import Part
from inkdrop.generate import sample
from inkdrop.plan import change
from inkdrop.recipe import open_data

SCALES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


def inside(points: Tensor, centres: Tensor, k: int = 3) -> float:
    """The share of points (N, D) that lie within the k-th neighbour's distance of some centre (M, D)."""
    radius = torch.cdist(centres, centres).kthvalue(k + 1, dim=1).values  # the first neighbour of each is itself
    return float((torch.cdist(points, centres) <= radius).any(dim=1).double().mean())


def spread(x: Tensor, labels: Tensor) -> float:
    """The mean distance of two images of a class, over all classes, in the unit of a pixel's range of 2."""
    means = []
    for label in labels.unique():
        own = x[labels == label].flatten(1)
        means.append(torch.cdist(own, own).sum() / (len(own) * (len(own) - 1)))
    return float(torch.stack(means).mean())


def evenly(data: Data, count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Images and labels, as many of each class, at random."""
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(seed)).tolist()
    labels = torch.cat([data.take(order[i : i + 1000])[1].label for i in range(0, len(order), 1000)])
    rows = [i for c in range(len(data.classes)) for i in (labels == c).nonzero()[: count // len(data.classes), 0]]
    x, cond = data.take([order[i] for i in rows])
    return x, cond.label


def moments(judge: Classifier, batches: Any) -> Moments:
    """Of the features of images."""
    made = Moments(judge.dim)
    for x in batches:
        made.update(judge(x))
    return made


def figures(judge: Classifier, x: Tensor, labels: Tensor, real: tuple[Tensor, Tensor], all_real: Moments) -> Any:
    """One row of the table."""
    made, there, own = judge(x), judge(real[0]), moments(judge, x.split(500))
    return {
        "accuracy": float((judge.probabilities(x).argmax(1) == labels).double().mean()),
        "fid": frechet(own.mean, own.cov, all_real.mean, all_real.cov),
        "precision": inside(made, there),
        "recall": inside(there, made),
        "spread": spread(x, labels) / spread(*real),
    }


def draw(rows: list[dict[str, Any]], floor: dict[str, Any], path: Path) -> None:
    """Two panels: accuracy and FID by scale; precision against recall, and accuracy against spread."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), dpi=110, layout="constrained")
    left, right = figure.subplots(1, 2)
    scales = [row["scale"] for row in rows]
    left.plot(scales, [row["fid"] for row in rows], "o-", color="#1b6ca8", label="FID")
    left.axhline(floor["fid"], color="#1b6ca8", linestyle=":", label="FID of training images")
    left.set(xlabel="guidance scale w (0 unconditional, 1 conditional)", ylabel="FID")
    twin = left.twinx()
    twin.plot(scales, [row["accuracy"] for row in rows], "s-", color="#c8553d", label="accuracy")
    twin.set(ylabel="share of the class that was asked for", ylim=(0, 1.03))
    lines = [*left.get_lines(), *twin.get_lines()]
    left.legend(lines, [str(line.get_label()) for line in lines], frameon=False, loc="center right")
    right.plot([row["recall"] for row in rows], [row["precision"] for row in rows], "o-", color="#444444")
    for row in rows:
        right.annotate(f"w = {row['scale']:g}", (row["recall"], row["precision"]), (6, 6), textcoords="offset points")
    right.plot(floor["recall"], floor["precision"], "*", markersize=13, color="#1b6ca8")
    right.annotate("training images", (floor["recall"], floor["precision"]), (-28, 10), textcoords="offset points")
    right.margins(0.12)
    right.set(xlabel="recall: diversity", ylabel="precision: fidelity")
    for axis in (left, right):
        axis.grid(alpha=0.25)
        axis.spines["top"].set_visible(False)
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("--data", type=Path, required=True, help="a folder with the four IDX files of MNIST")
    parser.add_argument("--samples", type=int, default=1000, help="at each scale")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--plot", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    model = load(args.run)
    train, test = (open_data(Part("mnist", {"data": str(args.data)}), split) for split in ("train", "test"))
    judge = features_for(train, test)
    assert isinstance(judge, Classifier)
    everything = moments(judge, (test.take(range(i, i + 500))[0] for i in range(0, len(test), 500)))
    real = evenly(test, args.samples, 1)
    floor = figures(judge, *evenly(train, args.samples, 0), real, everything)
    print("training images", json.dumps(floor), flush=True)
    labels, rows = torch.arange(args.samples) % len(model.classes), []
    for scale in SCALES:
        began = time.process_time()
        plan = change(model.plan, sampler="unipc", steps=12, guidance=scale, clip=True)
        x = sample(model, args.samples, seed=0, plan=plan, batch=250).clamp(-1, 1)
        row = {"scale": scale, **figures(judge, x, labels, real, everything)}
        rows.append({**row, "processor seconds": round(time.process_time() - began, 1)})
        print(json.dumps(rows[-1]), flush=True)
    about = {
        "samples": args.samples,
        "card": model.card,
        "classifier": {"hash": judge.hash, "accuracy": judge.accuracy},
    }
    about |= {"inkdrop": inkdrop.__version__, "torch": str(torch.__version__), "python": platform.python_version()}
    about |= {"machine": platform.machine(), "threads": torch.get_num_threads()}
    command = f"python bench/guidance_mnist.py runs/mnist --data PATH --samples {args.samples}"
    record = {"command": command, **about, "training images": floor, "rows": rows}
    if args.out is not None:
        args.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    if args.plot is not None:
        draw(rows, floor, args.plot)


if __name__ == "__main__":
    main()
