"""Train a classifier of noisy images, to guide samples by."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from inkdrop.classifier import NoisyClassifier, save_classifier
from inkdrop.core.dataset import Data
from inkdrop.core.forward import diffuse
from inkdrop.core.noise import Draw
from inkdrop.errors import BadArgument, BadData, Diverged
from inkdrop.recipe import Recipe, dump, open_data
from inkdrop.settings import Train
from inkdrop.train.halfway import Halfway
from inkdrop.train.held_out import BANDS
from inkdrop.train.order import learning_rate, rows_of
from inkdrop.train.trainer import device_of

__all__ = ["accuracy", "fit_classifier"]

Progress = Callable[[int, int, str], None]

_HELD_OUT = 2000  # images at most, over which the accuracy is counted


def fit_classifier(
    recipe: Recipe,
    out: Path | str | None = None,
    *,
    steps: int = 1500,
    batch: int = 128,
    lr: float = 2e-3,
    width: int = 32,
    blocks: int = 1,
    seed: int = 0,
    device: str = "auto",
    on_progress: Progress | None = None,
) -> NoisyClassifier:
    """Train p(y|x_t) on a recipe's data over its own schedule, by cross-entropy (Dhariwal & Nichol 2021, section 4).

    x_t = alpha·x0 + sigma·eps at a time that is uniform over the schedule's; AdamW with the paper's weight decay, 0.05,
    a linear warm-up of a twentieth and cosine decay to 0. Images, times and noise are keyed by (seed, update, place),
    dropout by (seed, update), weights by the seed: on one machine, with the same number of threads, it gives the same.

    Args:
        recipe: names the data, which must have classes, and the schedule.
        out: a new folder to write it to at the end; None writes nothing. The same call goes on with what was stopped,
            from the hidden folder beside it.
        steps: updates, ≥ 1.
        batch: images an update, ≥ 1.
        lr: the peak learning rate, > 0.
        width: channels of the first blocks; see `Encoder`.
        blocks: residual blocks at each size.
        seed: of weights, order and noise, in [0, 2^63).
        device: "auto", "cpu", "cuda", ...
        on_progress: f(done, total, text).

    Returns:
        The classifier, whose card holds its accuracy on held-out images in each fifth of time, from clean to noise.

    Raises:
        BadData: images without at least 2 classes.
        BadArgument: a number out of its range, a folder that exists, or a recipe of latents.
        Diverged: the loss left the finite numbers.
    """
    if recipe.codec is not None:
        raise BadArgument("classifier: the model works on latents, and this learns the classes of pictures; use cfg")
    train = Train(steps=steps, batch=batch, lr=lr, weight_decay=0.05, warmup=steps // 20, seed=seed)
    data, held_out, began = open_data(recipe.data, "train"), open_data(recipe.data, "test"), time.monotonic()
    if len(data.classes) < 2 or not len(data):
        raise BadData(f"classifier: {data.source} has {len(data.classes)} classes, need at least 2")
    if out is not None and Path(out).exists():
        raise BadArgument(f"{out}: exists already; choose another --out")
    torch.manual_seed(seed)
    made = NoisyClassifier(recipe.schedule, data.shape, data.classes, {"width": width, "blocks": blocks})
    about = {"data": data.fingerprint, "schedule": dump(recipe)["schedule"], "width": width, "blocks": blocks}
    halfway = Halfway(out, {**about, "train": asdict(train)})
    _fit(made.to(device_of(device)), data, train, halfway, on_progress)
    spent = halfway.seconds + time.monotonic() - began
    made.card |= {**_card(made, data, held_out, train), "seconds": round(spent, 1)}
    if out is not None:
        save_classifier(made, out)
        halfway.drop()
    return made


def _card(made: NoisyClassifier, data: Data, held_out: Data, train: Train) -> dict[str, Any]:
    """How it was trained, and how often it is right."""
    return {
        "data": data.source,
        "fingerprint": data.fingerprint,
        "samples": len(data),
        "updates": train.steps,
        "seed": train.seed,
        "parameters": sum(p.numel() for p in made.parameters()),
        "held_out": min(_HELD_OUT, len(held_out)),
        "accuracy": [round(share, 4) for share in accuracy(made, held_out, seed=train.seed)],
    }


def _fit(made: NoisyClassifier, data: Data, train: Train, halfway: Halfway, on_progress: Progress | None) -> None:
    """The updates that are not done."""
    device = made.net.stem.weight.device
    optimiser = torch.optim.AdamW(
        made.parameters(), lr=train.lr, betas=train.betas, weight_decay=train.weight_decay, fused=True
    )
    made.train()
    with halfway.running(made=made, optimiser=optimiser) as done:
        for update in range(done, train.steps):
            x0, label = _take(data, rows_of(update, train.batch, len(data), train.seed))
            torch.manual_seed((train.seed * 1_000_003 + update) % 2**63)  # nn.Dropout has no other key
            logits = made.logits(*_noisy(made, x0.to(device), Draw(train.seed, update, range(len(x0)))))
            loss = F.cross_entropy(logits, label.to(device))
            if not bool(loss.isfinite()):
                raise Diverged(f"classifier: the loss is not finite at update {update}; lower the learning rate")
            optimiser.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(made.parameters(), train.clip_grad)
            for group in optimiser.param_groups:
                group["lr"] = learning_rate(update, train)
            with halfway.update(update):
                optimiser.step()
            if on_progress is not None and ((update + 1) % 10 == 0 or update + 1 == train.steps):
                on_progress(update + 1, train.steps, f"loss {loss.item():.3f}")
    made.eval().requires_grad_(False)


def _take(data: Data, rows: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Images and their classes."""
    x0, cond = data.take(rows)
    if cond is None or cond.label is None:
        raise BadData(f"classifier: {data.source} gives images without a class")
    return x0, cond.label


def _noisy(made: NoisyClassifier, x0: Tensor, draw: Draw, t: Tensor | None = None) -> Any:
    """(x_t, level) at random times, or at these."""
    level = made.schedule(made.schedule.pick(draw.uniform("time") if t is None else t))
    return diffuse(x0, draw.normal(x0.shape, x0.dtype).to(x0.device), level), level


@torch.no_grad()
def accuracy(made: NoisyClassifier, data: Data, *, seed: int = 0, bands: int = BANDS) -> list[float]:
    """The share of images whose class is found, in each band of time from clean to noise; by chance it is 1/classes.

    Every one of the first 2,000 images is seen once in each band, at a time in it that runs through it evenly.

    Args:
        made: the classifier, in evaluation mode.
        data: images that it has not seen.
        seed: of the noise.
        bands: equal parts of the schedule's time, ≥ 1.
    """
    device, n = made.net.stem.weight.device, min(_HELD_OUT, len(data))
    right = [0] * bands
    for first in range(0, n, 500):
        rows = range(first, min(first + 500, n))
        x0, label = _take(data, rows)
        for band in range(bands):
            t = (band + (torch.tensor(rows, dtype=torch.float64) + 0.5) / n) / bands
            draw = Draw(seed, 2**62 + band, rows)
            found = made.logits(*_noisy(made, x0.to(device), draw, t)).argmax(1).cpu()
            right[band] += int((found == label).sum())
    return [count / n for count in right]
