"""The tables and plots of bench/lessons.py, all from its record."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from inkdrop import picture
from inkdrop.evals.interval import difference_of_means, mean_of

TITLES = {
    1: "Linear against cosine, by steps",
    2: "DDPM against DDIM, from the same noise",
    3: "What the net predicts: eps, x0, v, flow",
    4: "Learned against fixed variance",
    5: "Averaged weights on and off",
    6: "Guidance scale",
    7: "Four families: GAN, VAE, PixelCNN, diffusion",
    8: "How many steps the chain has",
    9: "beta against beta-tilde",
    10: "With and without time",
    11: "Two levels against three, at equal compute",
}
SHARED = {
    2: "samples of row 1's cosine model, seed 0",
    3: "x0 is row 1's cosine model",
    4: "fixed variances: row 3's v, seed 0",
    5: "the first two: row 1's cosine model, seed 0",
    7: "diffusion is row 1's cosine model",
    8: "T = 1000 is row 1's cosine model, seed 0",
    9: "row 1's cosine model, seed 0",
    10: "told the time: row 1's cosine model, seed 0",
    11: "three levels: row 1's cosine model, seed 0",
}
COLOURS = ("#1b6ca8", "#c8553d", "#3a7d44", "#7b4b94", "#b8860b", "#2aa198", "#d6589f", "#5c5c5c", "#8a5a44")


def settings_of(rows: Sequence[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """The rows of each setting, in the order in which they come."""
    found: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        found.setdefault(row["setting"], []).append(row)
    return found


def cell(rows: Sequence[dict[str, Any]], key: str, factor: float = 1, digits: int = 2) -> str:
    """A mean over seeds with its t-interval; of one seed the value, with the interval over images if there is one."""
    values = [factor * row[key] for row in rows]
    if len(values) > 1:
        found = mean_of(values)
        return f"{found.value:.{digits}f} [{found.low:.{digits}f}, {found.high:.{digits}f}]"
    se = rows[0].get(f"{key}_se")
    return f"{values[0]:.{digits}f}" + ("" if se is None else f" ± {1.96 * factor * se:.{digits}f}")


def table(rows: Sequence[dict[str, Any]]) -> Iterable[str]:
    """A table in Markdown, a line a setting."""
    bits = any(isinstance(row.get("bits"), dict) for row in rows)
    heads = ["setting", "seeds", "KID × 1000", "FID", "precision", "recall", "missing", "deviation", "asks", "sampling"]
    heads += ["bits/dim"] if bits else []
    yield f"| {' | '.join(heads)} |"
    yield f"|{' --- |' * len(heads)}"
    for setting, own in settings_of(rows).items():
        missing = sum(len(row["missing"]) for row in own)
        cells = [setting, str(len(own)), cell(own, "kid", 1000, 0), cell(own, "fid"), cell(own, "precision")]
        cells += [cell(own, "recall"), str(missing), cell(own, "deviation", digits=3)]
        cells += [str(own[0].get("asks", "–")), f"{own[0]['sampling']:.3g} s" if "sampling" in own[0] else "–"]
        cells += [f"{own[0]['bits']['bits']:.3f} ± {1.96 * own[0]['bits']['se']:.3f}"] if bits else []
        yield f"| {' | '.join(cells)} |"


def gaps(rows: Sequence[dict[str, Any]]) -> Iterable[str]:
    """By how much settings of several seeds differ, those of as many steps: Welch's interval over seeds."""
    many = {name: own for name, own in settings_of(rows).items() if len(own) > 1 and " at " not in name}
    for index, (name, own) in enumerate(many.items()):
        for other, theirs in list(many.items())[index + 1 :]:
            steps = {setting.partition(", ")[2] for setting in (name, other)} - {""}
            if len(steps) > 1:
                continue
            found = difference_of_means([1000 * r["kid"] for r in own], [1000 * r["kid"] for r in theirs])
            clear = "clear" if found.low > 0 or found.high < 0 else "not clear"
            yield f"| {name} − {other} | {found.value:.0f} [{found.low:.0f}, {found.high:.0f}] | {clear} |"


def write_pages(record: dict[str, Any], work: Path, path: Path, images: Path, page: Path | None = None) -> None:
    """Write lessons.md, a plot for each row that is there, and the tables on a page of the documents."""
    real = record["real"]
    lines = [
        "# Lessons, measured",
        "",
        f"`{record['command']}`",
        "",
        f"{record['data']}, at most 0.6 M parameters, {record['minutes']:g} minutes of one core a training, "
        f"N = {record['samples']:,} samples, features of the classifier {record['judge']['hash']} (right on "
        f"{record['judge']['accuracy']:.2%}). As many training images have KID × 1000 = {1000 * real['kid']:.2f} ± "
        f"{1960 * real['kid_se']:.2f}, FID {real['fid']:.2f}, precision {real['precision']:.2f}, recall "
        f"{real['recall']:.2f}.",
        "",
        "Brackets are 95 % t-intervals over training seeds. A ± is 1.96 standard errors over the images of one model: "
        "other trainings may differ by more. KID × 1000 below 0 is possible for equal distributions.",
    ]
    images.mkdir(parents=True, exist_ok=True)
    for number, rows in ((int(key), rows) for key, rows in record["rows"].items() if rows):
        own = [f"Shared trainings: {SHARED[number]}.", ""] if number in SHARED else []
        own += list(table(rows))
        if found := list(gaps(rows)):
            own += ["", "| difference of KID × 1000, over seeds | | |", "| --- | --- | --- |", *found]
        draw(number, rows, real, images / f"lessons-{number}.png")
        shown = grid(rows, work, images / f"lessons-{number}-samples.png")
        lines += ["", f"## {number}. {TITLES[number]}", "", *own]
        if page is not None:
            seen = f"![Ten samples of each line of the table, in its order](../images/lessons-{number}-samples.png)"
            plots = [f"![{TITLES[number]}](../images/lessons-{number}.png)", *(["", seen] if shown else [])]
            fill(page, number, [*own, "", *plots])
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def fill(page: Path, number: int, lines: Sequence[str]) -> None:
    """Put a row's lines between its two marks on a page of the documents, which has what is said about it."""
    before, mark, rest = page.read_text(encoding="utf-8").partition(f"<!-- lessons {number} -->\n")
    _, end, after = rest.partition("<!-- end -->")
    if not (mark and end):
        raise ValueError(f"{page}: no place for row {number} between '<!-- lessons {number} -->' and '<!-- end -->'")
    page.write_text(before + mark + "\n".join(["", *lines, ""]) + "\n" + end + after, encoding="utf-8")


def grid(rows: Sequence[dict[str, Any]], work: Path, path: Path) -> bool:
    """Ten samples of each setting's first seed, a row a setting, if all are there."""
    seen, shown = set[str](), []
    for row in rows:
        file = work / "figures" / f"{row['key']}.npy"
        if row["setting"] not in seen and file.exists() and " at " not in row["setting"]:
            seen.add(row["setting"])
            shown.append(torch.from_numpy(np.load(file, allow_pickle=False))[:10])
    if not shown or any(len(x) < 10 for x in shown):
        return False
    picture.save_grid(torch.cat(shown), path, columns=10, scale=2)
    return True


def draw(number: int, rows: Sequence[dict[str, Any]], real: dict[str, Any], path: Path) -> None:
    """KID by setting with its interval; fidelity against diversity, in row 6 along the scale; in row 7 speed, too."""
    from matplotlib.figure import Figure

    by_setting = {name: own for name, own in settings_of(rows).items() if " at " not in name}
    many = 3 if number == 7 else 2
    figure = Figure(figsize=(3 + 3 * many, max(3.2, 1.2 + 0.3 * len(by_setting))), dpi=110, layout="constrained")
    left, right, *further = figure.subplots(1, many)
    for place, (name, own) in enumerate(by_setting.items()):
        colour, values = COLOURS[place % len(COLOURS)], [1000 * row["kid"] for row in own]
        mean = mean_of(values) if len(own) > 1 else None
        middle, reach = (mean.value, mean.high - mean.value) if mean else (values[0], 1960 * own[0]["kid_se"])
        left.errorbar([middle], [-place], xerr=[reach], fmt="o", color=colour, capsize=3)
        left.plot(values, [-place] * len(values), "|", color="#444444")
        x, y = ([row[key] for row in own] for key in ("recall", "precision"))
        right.scatter(x, y, s=40, color=colour, alpha=0.8)
        for axis in further:
            spent = 1000 * own[0]["sampling"] / own[0]["n"]
            axis.scatter([spent] * len(values), values, s=40, color=colour, alpha=0.8)
        if number == 6:
            right.annotate(name, (x[0], y[0]), (6, 4), textcoords="offset points", fontsize=7)
    left.axvline(1000 * real["kid"], color="#444444", linestyle=":", label="training images")
    left.set_yticks([-i for i in range(len(by_setting))], list(by_setting), fontsize=8)
    for place, text in enumerate(left.get_yticklabels()):
        text.set_color(COLOURS[place % len(COLOURS)])
    left.set_ylim(0.5 - len(by_setting), 0.5)
    left.set_xlabel("KID × 1000, lower is better")
    if number == 6:
        line = [own[0] for own in by_setting.values()]
        right.plot([row["recall"] for row in line], [row["precision"] for row in line], color="#888888", linewidth=0.8)
    right.plot([real["recall"]], [real["precision"]], "*", markersize=12, color="#444444")
    where = (real["recall"], real["precision"])
    right.annotate("training images", where, (-30, 8), textcoords="offset points", fontsize=7)
    right.set(xlabel="recall: diversity", ylabel="precision: fidelity")
    right.margins(0.15)
    for axis in further:
        axis.set(xscale="log", xlabel="time a sample, ms: speed", ylabel="KID × 1000: quality")
    for axis in (left, right, *further):
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower left", frameon=False, fontsize=8)
    figure.savefig(path)
