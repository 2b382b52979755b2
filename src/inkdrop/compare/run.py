"""Run a comparison: plan, sample, score, set in order, report; stopped at any time, the same call goes on."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from inkdrop import picture
from inkdrop.bundle import Bundle
from inkdrop.compare import plots
from inkdrop.compare.question import Entry, afford, entries_of, question_of, read_plan
from inkdrop.compare.report import render
from inkdrop.core.dataset import Data
from inkdrop.demo.plots import need_matplotlib
from inkdrop.drawn import Samples
from inkdrop.errors import BadArgument
from inkdrop.eval_jobs import check_enough, split_of
from inkdrop.evals.features import Features, features_for
from inkdrop.evals.interval import difference_of_means, mean_of
from inkdrop.evals.nearest import Near
from inkdrop.evals.paired import gap, redraw
from inkdrop.evals.prdc import prdc
from inkdrop.evals.score import real_features, reference_shelf, score
from inkdrop.evals.shelf import Seen
from inkdrop.evals.stream import subset
from inkdrop.find import Part
from inkdrop.screen import Screen, seconds_text
from inkdrop.train.record import describe_run, write_atomically

__all__ = ["run_compare"]

FEWEST = 6
"""Precision and recall are by each image's fifth neighbour, and a bootstrap of fewer images says nothing."""

SHOWN = 10
"""Images of each entry in the grid."""

_BALLS = 2000
"""Precision and recall are of so many images at most, chosen at random: of each data set a table of distances."""


def run_compare(
    bundles: Sequence[tuple[str, Bundle]],
    out: Path,
    *,
    data: Path | None,
    count: int,
    seed: int,
    samplers: Sequence[str] = (),
    steps: Sequence[int] = (),
    guidance: Sequence[float] = (),
    budget: str | None = None,
    features: Part | None = None,
    screen: Screen,
) -> Path:
    """Compare models and ways to sample them, and return the path of the report.

    Args:
        bundles: names and models of one data set.
        out: a new folder, or that of the same comparison, which goes on.
        data: where the data are now, if not where they were.
        count: images of each entry, at most, ≥ 6.
        seed: of the noise, the same for all.
        samplers: by name; each model's own if none.
        steps: of the samplers; each model's own if none.
        guidance: scales; each model's own if none.
        budget: of time or asks for the sampling, as `read_budget` reads it.
        features: the extractor; None for the best without a download.
        screen: shows progress.

    Raises:
        BadArgument: nothing to compare, other data, too little budget, or a folder that holds something else.
        MissingExtra: matplotlib is not installed.
    """
    need_matplotlib()
    if count < FEWEST:
        raise BadArgument(f"compare: got {count} samples, need at least {FEWEST}; try 1000")
    entries = entries_of(bundles, samplers, steps, guidance)
    train, test = (split_of(bundles[0][1], data, split) for split in ("train", "test"))
    check_enough(bundles[0][1], train, test)
    _check_data(bundles, train)
    question = question_of(entries, count, seed, budget, features)
    plan = read_plan(out, question)
    if plan is None:
        n, seconds = afford(entries, count, budget, test)
        plan = {"question": question, "n": n, "seconds_an_image": seconds}
        out.mkdir(parents=True, exist_ok=True)
        write_atomically(out / "plan.json", plan)
    _say_plan(entries, plan, screen)
    extractor = features_for(train, test, features, on_progress=screen.task("training the judge"))
    samples = [entry.samples(plan["n"], seed, train, test, extractor) for entry in entries]
    rows, seen = [], []
    for entry, drawn in zip(entries, samples, strict=True):
        figures, found = _answer(entry, drawn, screen)
        rows.append(figures)
        seen.append(found)
    reference = reference_shelf(train, test, extractor)
    real, floor = real_features(train, test, extractor, plan["n"], seed, reference)
    *balls, of_floor = _balls([*seen, floor], real, seed)
    rows = [{**row, **ball} for row, ball in zip(rows, balls, strict=True)]
    record = _record(entries, rows, plan, seed, train, test, extractor) | {"floor": of_floor}
    record |= {"recipes": _recipes(entries, rows), "differences": _differences(entries, rows, seen, real, seed)}
    _draw(samples, rows, of_floor, out)
    write_atomically(out / "compare.json", record)
    return render(out, record)


def _check_data(bundles: Sequence[tuple[str, Bundle]], train: Data) -> None:
    """Refuse models that say they were trained on other data."""
    for name, bundle in bundles:
        known = bundle.card.get("fingerprint")
        if known is not None and known != train.fingerprint:
            raise BadArgument(f"compare: {name} was trained on other data than these; compare models of one data set")


def _say_plan(entries: Sequence[Entry], plan: dict[str, Any], screen: Screen) -> None:
    n, total = plan["n"], plan["n"] * sum(plan["seconds_an_image"])
    for entry, each in zip(entries, plan["seconds_an_image"], strict=True):
        screen.say(f"{entry.label}: {n:,} images, {entry.facts()['asks']:,} asks each: about {seconds_text(n * each)}")
    screen.say(f"in all about {seconds_text(total)} of sampling; what is in the cache is not drawn again")


def _answer(entry: Entry, samples: Samples, screen: Screen) -> tuple[dict[str, Any], Tensor]:
    """The figures of one entry, and its features (N, D) in the order of the noise."""
    train, test, features, seed = samples.train, samples.test, samples.features, samples.seed
    kept, spent, shelf = list[Tensor](), list[float](), samples.shelf()

    def seen() -> Any:
        for found in samples.seen(shelf, screen):
            kept.append(found["features"])
            spent.append(float(found["seconds"]))
            yield Seen(found["features"], Near(found["distance"], found["row"].tolist()))

    reference = reference_shelf(train, test, features)
    labels = samples.labels()
    figures = score(seen(), train, test, features, labels=labels, seed=seed, shelf=reference)
    keys = ("n", "fid", "fid_floor", "kid", "kid_floor", "intervals", "classes", "warnings")
    row = {**entry.facts(), **{key: figures[key] for key in keys}}
    row |= {
        "copies": figures["nearest"]["rate"],
        "seconds": sum(spent),
        "seconds_a_thousand": 1000 * sum(spent) / samples.count,
    }
    return row, torch.cat(kept)


def _balls(made: Sequence[Tensor], real: Tensor, seed: int) -> list[dict[str, float | None]]:
    """Precision and recall of each set of features, against as many held-out images as the first has, 2,000 at most."""
    few = real[subset(len(real), min(len(made[0]), _BALLS), seed=seed, draw=3)]
    found = []
    for features in made:
        some = features[subset(len(features), _BALLS, seed=seed, draw=4)]
        seen = prdc(few, some) if min(len(few), len(some)) > 5 else None
        found.append({name: None if seen is None else getattr(seen, name) for name in ("precision", "recall")})
    return found


def _record(
    entries: Sequence[Entry],
    rows: list[dict[str, Any]],
    plan: dict[str, Any],
    seed: int,
    train: Data,
    test: Data,
    features: Features,
) -> dict[str, Any]:
    """What was compared, on what, with what."""
    return {
        "n": plan["n"],
        "asked_for": plan["question"]["n"],
        "budget": plan["question"]["budget"],
        "seed": seed,
        "resize": features.resize,
        "data": {
            name: {"n": len(data), "source": data.source, "fingerprint": data.fingerprint}
            for name, data in (("train", train), ("test", test))
        },
        "features": {"name": features.name, "hash": features.hash, "dim": features.dim, "note": features.note},
        "run": describe_run(seed),
        "entries": rows,
    }


def _groups(entries: Sequence[Entry]) -> dict[tuple[str, int], list[int]]:
    """Entries that differ by the seed of their training alone; copies of a run are none."""
    found: dict[tuple[str, int], list[int]] = {}
    copies = Counter[tuple[str, int]]()
    for index, entry in enumerate(entries):
        found.setdefault((entry.recipe, copies[entry.recipe, entry.seed]), []).append(index)
        copies[entry.recipe, entry.seed] += 1
    return found


def _recipes(entries: Sequence[Entry], rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The mean over training seeds and its t-interval, of each recipe of which there are several runs."""
    return [
        {
            "entries": [entries[i].label for i in group],
            "over": "training seeds",
            "kid": mean_of([rows[i]["kid"]["mean"] for i in group])._asdict(),
            "fid": mean_of([rows[i]["fid"] for i in group])._asdict(),
        }
        for group in _groups(entries).values()
        if len(group) > 1
    ]


def _differences(
    entries: Sequence[Entry], rows: Sequence[dict[str, Any]], seen: Sequence[Tensor], real: Tensor, seed: int
) -> list[dict[str, Any]]:
    """By how much each two recipes differ: over training seeds where both have several, else over images."""
    pairs = list(combinations(_groups(entries).values(), 2))
    paired = sorted({group[0] for pair in pairs if not _seeded(*pair) for group in pair})
    drawn = dict(zip(paired, redraw([seen[i] for i in paired], real, seed=seed), strict=True)) if paired else {}
    found = []
    for a, b in pairs:
        for metric in ("kid", "fid"):
            mine, theirs = ([_value(rows[i], metric) for i in group] for group in (a, b))
            if _seeded(a, b):
                gone = difference_of_means(mine, theirs)
            else:
                gone = gap(mine[0] - theirs[0], drawn[a[0]][metric], drawn[b[0]][metric])
            over = "training seeds" if _seeded(a, b) else "images"
            pair = {"a": entries[a[0]].label, "b": entries[b[0]].label, "metric": metric, "over": over}
            found.append({**pair, **gone._asdict(), "clear": gone.low > 0 or gone.high < 0})
    return found


def _seeded(a: Sequence[int], b: Sequence[int]) -> bool:
    """Whether both recipes have several runs."""
    return min(len(a), len(b)) > 1


def _value(row: dict[str, Any], metric: str) -> float:
    value: float = row["kid"]["mean"] if metric == "kid" else row["fid"]
    return value


def _draw(samples: Sequence[Samples], rows: Sequence[dict[str, Any]], floor: dict[str, Any], out: Path) -> None:
    """Plots, and the first samples of all entries, which are told and drawn as those scored, a row an entry."""
    pictures = out / "pictures"
    pictures.mkdir(exist_ok=True)
    plots.cost(rows, pictures / "cost.png")
    plots.trade(rows, floor, pictures / "trade.png")
    if len(samples[0].bundle.shape) == 3:
        few = range(min(SHOWN, samples[0].count))
        name = f"shown-{len(few)}"
        x = torch.cat([each.shelf().get(name, partial(each.draw, few))["x"] for each in samples])
        picture.save_grid(x, pictures / "samples.png", columns=len(few), scale=4 if x.shape[-1] < 40 else 1)
