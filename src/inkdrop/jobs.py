"""The work behind the commands: open a model, draw samples and write them, score it."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import numpy as np
import torch
from torch import Tensor

from inkdrop import picture
from inkdrop.bundle import Bundle, load, write_folder
from inkdrop.core.ask import Belief
from inkdrop.drive import Step, watch
from inkdrop.errors import BadArgument
from inkdrop.find import check_knobs, find
from inkdrop.generate import labels_of, sample
from inkdrop.plan import change, grid_of
from inkdrop.recipe import dump, open_data, set_knobs
from inkdrop.train.record import write_atomically
from inkdrop.train.trainer import device_of

if TYPE_CHECKING:
    from inkdrop.screen import Screen

__all__ = [
    "asks_of",
    "draw",
    "each_label",
    "open_bundle",
    "refuse_file",
    "refuse_folder",
    "score_bundle",
    "with_plan",
    "write_figures",
    "write_samples",
]

SAMPLING_SLOTS = ("sampler", "grid", "plan")


def open_bundle(checkpoint: Path, weights: str, trust: bool, device: str) -> Bundle:
    """Load a checkpoint onto a device."""
    kind = cast(Literal["ema", "raw"], weights)
    return load(checkpoint, weights=kind, trust=trust, device=str(device_of(device)))


def with_plan(bundle: Bundle, changes: Mapping[str, Any], settings: Iterable[str]) -> Bundle:
    """The bundle with another way of sampling.

    Args:
        bundle: the model.
        changes: sampler, steps, grid, guidance, clip; None where nothing was said.
        settings: "sampler.eta=0.5" and the like.

    Raises:
        BadArgument: a setting that is not about sampling.
    """
    recipe = replace(bundle.recipe, plan=change(bundle.recipe.plan, **changes))
    guide = tuple(p.name for p in recipe.plan.guide)
    for text in settings:
        slot = text.partition("=")[0].partition(".")[0].strip()
        if slot not in (*SAMPLING_SLOTS, *guide):
            raise BadArgument(
                f"--set: got {text!r}, but of a trained model only "
                f"{', '.join((*SAMPLING_SLOTS, *guide))} can change; train anew to change more"
            )
    return replace(bundle, recipe=set_knobs(recipe, settings))


def asks_of(bundle: Bundle) -> int:
    """How many questions a sample costs with the bundle's plan: counted, by running its sampler on nothing."""
    plan, nothing = bundle.plan, torch.zeros(1, 1)
    sampler = find("samplers", plan.sampler.name)
    knobs = check_knobs(plan.sampler.name, sampler, plan.sampler.knobs)
    work = sampler(nothing, grid_of(plan, bundle.schedule), lambda x, now, nxt: x, **knobs)
    return sum(1 for _ in watch(work, lambda ask: Belief(nothing, nothing, nothing))) - 1


def each_label(label: Sequence[str] | None, count: int) -> list[str] | None:
    """One label an image from a few labels, in turn."""
    return None if not label else [label[i % len(label)] for i in range(count)]


def draw(bundle: Bundle, count: int, seed: int, label: Sequence[str] | None, screen: Screen) -> Tensor:
    """Samples with a progress bar; the given classes in turn."""
    heard = screen.sampling(count, asks_of(bundle))
    return sample(
        bundle, count, seed=seed, label=each_label(label, count), on_step=lambda done, step: heard(done, step)
    )


def refuse_file(path: Path) -> None:
    """Refuse a file that could not be written or replaced, before any work is done.

    Raises:
        BadArgument: it is a folder, or its folder cannot be made.
    """
    if path.is_dir():
        raise BadArgument(f"{path}: is a folder, need a file; choose another --out")
    base = next(place for place in path.absolute().parents if place.exists())
    if not (base.is_dir() and os.access(base, os.W_OK)):
        raise BadArgument(f"{path}: cannot be made, as {base} is no folder that can be written; choose another --out")


def refuse_folder(path: Path, overwrite: bool) -> None:
    """Refuse to write over something, before any work is done; only an older sample folder may be replaced.

    Raises:
        BadArgument: it exists, or cannot be made.
    """
    if not path.exists():
        refuse_file(path)
    elif not overwrite:
        raise BadArgument(f"{path}: exists already; choose another --out, or --overwrite")
    elif not (path / "sample.json").is_file():
        raise BadArgument(
            f"{path}: is not a folder of samples (no sample.json), so it is not overwritten; choose another --out"
        )


def write_samples(
    x: Tensor, path: Path, bundle: Bundle, seed: int, label: Sequence[str] | None, overwrite: bool
) -> None:
    """Write samples as a new folder, whole or not at all.

    grid.png where they can be drawn; one PNG a sample where they are pictures, else samples.npy (float32, in the range
    of the data); sample.json with how they were made.
    """
    refuse_folder(path, overwrite)
    labels = labels_of(each_label(label, len(x)), len(x), bundle.classes)
    record = {
        "seed": seed,
        "count": len(x),
        "classes": None if labels is None else [bundle.classes[i] for i in labels.tolist()],
        "plan": dump(bundle.recipe)["plan"],
        "card": bundle.card,
    }
    files: dict[str, Any] = {
        "sample.json": lambda p: p.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    }
    if x.ndim == 4 or x.shape[1:] in ((1,), (2,)):
        files["grid.png"] = lambda p: picture.save_grid(x[:256], p)
    if picture.is_picture(tuple(x.shape[1:])):
        for i, one in enumerate(x):
            files[f"{i:06d}.png"] = lambda p, one=one: picture.image(one).save(p)
    else:
        files["samples.npy"] = lambda p: np.save(p, x.numpy())
    _replace_folder(path, files)


def _replace_folder(path: Path, files: Mapping[str, Callable[[Path], Any]]) -> None:
    """Write a folder whole or not at all; an older one of its name goes only when the new one is there."""
    if not path.exists():
        return write_folder(path, files)
    old = path.with_name(f".{path.name}.{os.getpid()}.old")
    path.rename(old)
    try:
        write_folder(path, files)
    except BaseException:
        old.rename(path)
        raise
    return shutil.rmtree(old)


def score_bundle(
    bundle: Bundle, count: int, seed: int, data: Path | None, screen: Screen, *, batch: int = 256
) -> dict[str, Any]:
    """Score a model against its data: one dict of figures, as plain JSON.

    Args:
        bundle: the model, with the plan to sample by.
        count: how many samples, ≥ 2.
        seed: of the samples.
        data: where the data are now, if not where they were.
        screen: shows progress.
        batch: samples at a time.
    """
    from inkdrop.evals.features import features_for
    from inkdrop.evals.score import score

    if count < 2:
        raise BadArgument(f"eval: got {count} samples, need at least 2; try 1000")
    part = bundle.recipe.data
    if data is not None:
        part = set_knobs(bundle.recipe, [f"data.data={json.dumps(str(data))}"]).data
    train, test = open_data(part, "train"), open_data(part, "test")
    if train.shape != bundle.shape:
        raise BadArgument(f"eval: the data have shape {train.shape}, but the model makes {bundle.shape}")
    features = features_for(train, test, on_progress=screen.task("training the judge"))
    labels = labels_of(None, count, bundle.classes)
    show = screen.sampling(count, asks_of(bundle))

    outside: list[float] = []

    def batches() -> Iterator[Tensor]:
        for start in range(0, count, batch):
            rows = range(start, min(start + batch, count))
            label = None if labels is None else labels[rows.start : rows.stop].tolist()

            def heard(_: int, step: Step, done: int = start) -> None:
                show(done, step)

            x = sample(bundle, len(rows), seed=seed, first=start, label=label, batch=batch, on_step=heard)
            outside.append(float((x.abs() > 1).float().mean()))
            yield x.clamp(-1, 1)

    figures = score(batches(), train, test, features, labels=labels, seed=seed, on_progress=screen.task("scoring"))
    how = {
        "clamped": max(outside),  # the greatest share of values in a batch that left [-1, 1]
        "checkpoint": bundle.card,
        "plan": dump(bundle.recipe)["plan"],
        "seed": seed,
        "threads": torch.get_num_threads(),
    }
    return {**figures, **how}


def write_figures(figures: Mapping[str, Any], path: Path) -> None:
    """Write figures as JSON, whole or not at all; the folder is made."""
    path.absolute().parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, dict(figures))
