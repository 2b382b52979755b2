"""The plots of a comparison (matplotlib)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

__all__ = ["cost", "trade"]

COLOURS = ("#1b6ca8", "#c8553d", "#3a7d44", "#7b4b94", "#b8860b", "#444444")


def _axes(count: int) -> tuple[Any, list[Any]]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.0 * count, 3.6), dpi=110, layout="constrained")
    axes = list(figure.subplots(1, count, squeeze=False)[0])
    for axis in axes:
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _lines(rows: Sequence[Mapping[str, Any]], along: str) -> dict[str, list[Mapping[str, Any]]]:
    """Rows that differ in one thing alone, by what the others are."""
    found: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        own = {"model": row["model"], "sampler": row["sampler"], "steps": row["steps"], "guidance": row["guidance"]}
        name = ", ".join(str(value) for key, value in own.items() if key != along and value is not None)
        found.setdefault(name.replace("$", r"\$"), []).append(row)  # else matplotlib reads formulas in names
    return found


def cost(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """KID against asks and against seconds, a line for each model, sampler and scale; bars are 95 % over images."""
    figure, axes = _axes(2)
    for place, (name, own) in enumerate(_lines(rows, "steps").items()):
        own = sorted(own, key=lambda row: row["asks"])
        values = [1000 * row["kid"]["mean"] for row in own]
        reach = [1960 * row["kid"]["se"] for row in own]
        for axis, key in zip(axes, ("asks", "seconds_a_thousand"), strict=True):
            x = [row[key] for row in own]
            axis.errorbar(x, values, reach, fmt="o-", capsize=3, color=COLOURS[place % len(COLOURS)], label=name)
    for axis, text in zip(axes, ("asks a sample", "seconds for 1,000 samples"), strict=True):
        axis.axhline(1000 * rows[0]["kid_floor"]["mean"], color="#444444", linestyle=":", label="training images")
        axis.set(xlabel=text, ylabel="KID × 1000", xscale="log")
    axes[0].legend(frameon=False, fontsize=8)
    figure.savefig(path)


def trade(rows: Sequence[Mapping[str, Any]], floor: Mapping[str, Any], path: Path) -> None:
    """Fidelity against diversity, a line over guidance scales where there are several; none where neither is known."""
    known = [row for row in rows if row["recall"] is not None]
    if not known:
        return
    figure, [axis] = _axes(1)
    for place, (name, own) in enumerate(_lines(known, "guidance").items()):
        own = sorted(own, key=lambda row: row["guidance"] or 0.0)
        axis.plot(
            [row["recall"] for row in own],
            [row["precision"] for row in own],
            "o-",
            color=COLOURS[place % len(COLOURS)],
            label=name,
        )
        for row in own if len(own) > 1 else ():
            axis.annotate(
                f"w = {row['guidance']:g}",
                (row["recall"], row["precision"]),
                (5, 5),
                textcoords="offset points",
                fontsize=7,
            )
    if floor["recall"] is not None:
        axis.plot(floor["recall"], floor["precision"], "k*", label="training images")
    axis.set(xlabel="recall: diversity", ylabel="precision: fidelity")
    axis.legend(frameon=False, fontsize=8)
    axis.margins(0.15)
    figure.savefig(path)
