"""The demo's plots (matplotlib)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from inkdrop.core.schedule import Schedule
from inkdrop.errors import MissingExtra

__all__ = ["losses", "need_matplotlib", "schedules"]

COLOURS = {"cosine": "#1b6ca8", "linear": "#c8553d"}


def need_matplotlib() -> None:
    """Refuse early where plots cannot be drawn.

    Raises:
        MissingExtra: matplotlib is not installed.
    """
    try:
        import matplotlib
    except ImportError:
        raise MissingExtra("the demo's report", "matplotlib", "plot") from None
    matplotlib.use("Agg")


def _axes(count: int) -> tuple[Any, list[Any]]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.2 * count, 3.0), dpi=110, layout="constrained")
    axes = list(figure.subplots(1, count, squeeze=False)[0])
    for axis in axes:
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    return figure, axes


def schedules(by_name: Mapping[str, Schedule], path: Path) -> None:
    """alpha, sigma and log-SNR against time, a colour a schedule."""
    figure, axes = _axes(3)
    for name, schedule in by_name.items():
        t = torch.linspace(schedule.least, 1, 200, dtype=torch.float64)
        level = schedule(t)
        for axis, y in zip(
            axes, (level.alpha, level.sigma, 2 * level.lam / torch.log(torch.tensor(10.0))), strict=True
        ):
            axis.plot(t, y, label=name, color=COLOURS.get(name))
    for axis, title in zip(axes, ("alpha: signal left", "sigma: noise", "log10 of signal-to-noise"), strict=True):
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("time t (0 clean, 1 noise)", fontsize=9)
    axes[0].legend(frameon=False)
    figure.savefig(path)


def losses(by_name: Mapping[str, Sequence[Mapping[str, Any]]], path: Path) -> None:
    """Training loss (averaged over neighbouring lines of the log) and held-out loss against updates."""
    figure, axes = _axes(2)
    for name, lines in by_name.items():
        log = [line for line in lines if "loss" in line]
        width = max(1, len(log) // 60)
        chunks = [log[i : i + width] for i in range(0, len(log), width)]
        axes[0].plot(
            [c[-1]["update"] for c in chunks],
            [sum(line["loss"] for line in c) / len(c) for c in chunks],
            label=name,
            color=COLOURS.get(name),
        )
        held = [line for line in lines if "loss" in line.get("held_out", {})]
        axes[1].plot([h["update"] for h in held], [h["held_out"]["loss"] for h in held], "o-", color=COLOURS.get(name))
    for axis, title in zip(axes, ("training loss", "held-out loss, fixed noise, averaged weights"), strict=True):
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("updates", fontsize=9)
        axis.set_yscale("log")
    axes[0].legend(frameon=False)
    figure.savefig(path)
