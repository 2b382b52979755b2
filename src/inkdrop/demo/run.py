"""Train, measure, report."""

from __future__ import annotations

import json
import shutil
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from inkdrop import picture
from inkdrop.bundle import Bundle, load
from inkdrop.core.forward import diffuse
from inkdrop.core.noise import normal
from inkdrop.demo import plots
from inkdrop.demo.report import render
from inkdrop.errors import BadArgument
from inkdrop.eval_jobs import score_bundle
from inkdrop.evals.nearest import nearest
from inkdrop.find import Part
from inkdrop.generate import sample, steps
from inkdrop.recipe import open_data
from inkdrop.recipes.digits import digits
from inkdrop.train.loop import fit
from inkdrop.train.record import describe_run, write_atomically

if TYPE_CHECKING:
    from inkdrop.screen import Screen

__all__ = ["SCHEDULES", "draw", "measure", "run_demo"]

SCHEDULES = ("cosine", "linear")
MARK = "figures.json"
SEED = 0


def run_demo(out: Path, *, updates: int, samples: int, screen: Screen) -> Path:
    """Train the two models, measure them, write out/report.html, and return its path.

    Args:
        out: a new folder, or one that holds an older demo, which is replaced.
        updates: optimiser updates of each model.
        samples: how many DDIM-50 samples are scored; the 10-step comparison uses half as many.
        screen: shows progress.

    Raises:
        BadArgument: the folder holds something else.
        MissingExtra: matplotlib is not installed.
        Stopped: by a signal; the same call begins again.
    """
    plots.need_matplotlib()
    if out.exists() and any(out.iterdir()) and not ((out / MARK).exists() or (out / "runs" / "cosine").exists()):
        raise BadArgument(f"{out}: holds something else than a demo; choose another --out")
    shutil.rmtree(out, ignore_errors=True)
    began = time.monotonic()
    for name in SCHEDULES:
        recipe = digits()
        train = replace(recipe.train, steps=updates, preview_every=max(1, updates // 4), save_every=updates)
        recipe = replace(recipe, schedule=Part(name), train=train)
        fit(recipe, out / "runs" / name, heard=screen.training(f"training ({name})", quiet=True))
    draw(out, screen=screen)
    figures = measure(out, samples=samples, screen=screen)
    figures["minutes"] = round((time.monotonic() - began) / 60, 2)
    write_atomically(out / MARK, figures)
    return render(out)


def draw(out: Path, *, screen: Screen) -> None:
    """Write the pictures of a demo folder's two models to out/pictures."""
    models = {name: load(out / "runs" / name) for name in SCHEDULES}
    pictures = out / "pictures"
    pictures.mkdir(exist_ok=True)
    _show_forward(pictures, models)
    _show_loss(pictures, out)
    _show_samples(pictures, models["cosine"], screen)
    _show_neighbours(pictures, models["cosine"])
    for name, model in models.items():
        _save(sample(model, 20, seed=2, steps=10), pictures / f"ten-{name}.png", 10)


def measure(out: Path, *, samples: int, screen: Screen) -> dict[str, Any]:
    """Score a demo folder's two models and write out/figures.json: every figure that the report prints.

    Args:
        out: the folder.
        samples: of the cosine model by DDIM-50; the 10-step comparison uses half as many.
        screen: shows progress.
    """
    models = {name: load(out / "runs" / name) for name in SCHEDULES}
    half = max(2, samples // 2)
    figures: dict[str, Any] = {
        "run": describe_run(SEED),
        "models": {name: model.card for name, model in models.items()},
        "ddim50": score_bundle(models["cosine"], samples, SEED, None, screen),
    }
    for name, model in models.items():
        short = replace(model, recipe=replace(model.recipe, plan=replace(model.plan, steps=10)))
        figures[f"{name}10"] = score_bundle(short, half, SEED, None, screen)
    write_atomically(out / MARK, figures)
    return figures


def _save(x: Tensor, path: Path, columns: int, scale: int = 6) -> None:
    picture.save_grid(x, path, columns=columns, scale=scale)


def _show_forward(pictures: Path, models: dict[str, Bundle]) -> None:
    """The schedules, and one real digit at six times of each."""
    plots.schedules({name: model.schedule for name, model in models.items()}, pictures / "schedules.png")
    x0, _ = open_data(digits().data, "train").take([3])
    eps = normal(x0.shape, 0, [0], 0).to(x0.dtype)
    for name, model in models.items():
        at = [model.schedule(t / 1000) for t in (0, 100, 250, 500, 750, 1000)]
        _save(torch.cat([diffuse(x0, eps, level) for level in at]), pictures / f"forward-{name}.png", 6, scale=10)


def _show_loss(pictures: Path, out: Path) -> None:
    logs = {name: (out / "runs" / name / "stats.jsonl").read_text(encoding="utf-8").splitlines() for name in SCHEDULES}
    plots.losses({name: [json.loads(line) for line in lines] for name, lines in logs.items()}, pictures / "loss.png")


def _show_samples(pictures: Path, model: Bundle, screen: Screen) -> None:
    """The grid by class, one digit emerging, and DDPM beside DDIM from the same noise."""
    by_class = [c for c in range(10) for _ in range(10)]
    _save(sample(model, 100, label=by_class, seed=1), pictures / "classes.png", 10)
    walk = list(steps(model, 1, label=3, seed=4))
    shown = [walk[round(i * (len(walk) - 1) / 9)] for i in range(10)]
    _save(torch.cat([torch.cat([s.x for s in shown]), torch.cat([s.x0 for s in shown])]), pictures / "emerging.png", 10)
    report = screen.task("DDPM, 1000 steps")
    ddpm = sample(model, 20, seed=2, sampler="ddpm", steps=1000, on_step=lambda _, step: report(step.number, 1000, ""))
    _save(ddpm, pictures / "ddpm-1000.png", 10)
    for count in (50, 10):
        _save(sample(model, 20, seed=2, steps=count), pictures / f"ddim-{count}.png", 10)


def _show_neighbours(pictures: Path, model: Bundle) -> None:
    """Twenty samples over the training images nearest to them."""
    x = sample(model, 20, seed=3)
    train = open_data(model.recipe.data, "train")
    near = nearest(x, train)
    real, _ = train.take(near.rows)
    _save(torch.cat([x, real]), pictures / "neighbours.png", 20, scale=4)
