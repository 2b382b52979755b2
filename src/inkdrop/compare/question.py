"""Question: what is to be compared, how much of it a budget affords, and where it is written down."""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from inkdrop.bundle import Bundle
from inkdrop.core.dataset import Data
from inkdrop.drawn import Samples, identity, pace
from inkdrop.errors import BadArgument, BadData
from inkdrop.evals.features import Features
from inkdrop.find import Part
from inkdrop.jobs import asks_of, guided_asks_of
from inkdrop.plan import change
from inkdrop.recipe import dump

__all__ = ["LEAST", "Entry", "afford", "entries_of", "names_of", "question_of", "read_budget", "read_plan"]

LEAST = 50
"""Fewer images an entry are not compared."""


@dataclass(frozen=True)
class Entry:
    """One way of sampling one model.

    Attributes:
        label: the model's name and what differs from others of it.
        model: its name.
        bundle: with the plan.
        recipe: its recipe without the seed, its plan and how many updates it has had, as JSON.
    """

    label: str
    model: str
    bundle: Bundle
    recipe: str

    @property
    def seed(self) -> int:
        """Of its training."""
        return self.bundle.recipe.train.seed

    def samples(self, count: int, seed: int, train: Data, test: Data, features: Features) -> Samples:
        """Its samples."""
        return Samples(self.bundle, count, seed, train, test, features)

    def facts(self) -> dict[str, Any]:
        """What it is, as plain JSON."""
        plan = dump(self.bundle.recipe)["plan"]
        guidance = next((p["knobs"].get("scale", 1.0) for p in plan["guide"] if p["name"] == "cfg"), None)
        about = {"label": self.label, "model": self.model, "sampler": plan["sampler"]["name"], "steps": plan["steps"]}
        trained = {"training_seed": self.seed, "updates": self.bundle.card.get("updates")}
        return {**about, "guidance": guidance, "asks": guided_asks_of(self.bundle), **trained, "plan": plan}


def entries_of(
    bundles: Sequence[tuple[str, Bundle]], samplers: Sequence[str], steps: Sequence[int], scales: Sequence[float]
) -> list[Entry]:
    """Every model with every sampler, number of steps and guidance scale; what is not said is the model's own.

    Raises:
        BadArgument: fewer than 2 entries, one twice, or models of other shapes.
    """
    for what, given in (("sampler", samplers), ("steps", steps), ("guidance", scales)):
        if twice := [str(value) for value in dict.fromkeys(given) if given.count(value) > 1]:
            raise BadArgument(f"compare {what}: got {', '.join(twice)} twice, need each once")
    found = []
    own: tuple[None] = (None,)
    for (name, bundle), sampler, count, scale in itertools.product(
        bundles, samplers or own, steps or own, scales or own
    ):
        if bundle.shape != bundles[0][1].shape:
            raise BadArgument(f"compare: {name} makes {bundle.shape}, {bundles[0][0]} makes {bundles[0][1].shape}")
        plan = change(bundle.plan, sampler=sampler, steps=count, guidance=scale)
        made = replace(bundle, recipe=replace(bundle.recipe, plan=plan))
        words = [sampler, None if count is None else f"{count} steps", None if scale is None else f"w = {scale:g}"]
        recipe = dump(replace(made.recipe, train=replace(made.recipe.train, seed=0)))
        label = ", ".join([name, *(word for word in words if word)])
        found.append(Entry(label, name, made, json.dumps([recipe, bundle.card.get("updates")], sort_keys=True)))
    if len(found) < 2:
        raise BadArgument("compare: got one model and one way to sample it; give two, or --steps 10 --steps 50")
    if len({entry.label for entry in found}) < len(found):
        raise BadArgument("compare: got two entries of one name; give models of different names")
    return found


def names_of(paths: Sequence[Path]) -> list[str]:
    """What to call models in folders: their last names, with those of the folders above where these tell them apart.

    Raises:
        BadArgument: a folder twice.
    """
    parts = [[part for part in Path(os.path.abspath(path)).parts if part != "checkpoints"] for path in paths]
    found = []
    for own, path in zip(parts, paths, strict=True):
        if parts.count(own) > 1:
            raise BadArgument(f"compare: got {path} twice, need each model once; try --steps 10 --steps 50")
        depth = next(d for d in range(1, len(own) + 1) if sum(other[-d:] == own[-d:] for other in parts) == 1)
        found.append("/".join(own[-depth:]))
    return found


def read_budget(text: str) -> tuple[str, float]:
    """("seconds", s) of "90s", "15m" or "2h"; ("asks", n) of "200000asks".

    Raises:
        BadArgument: not of that form, or not above 0.
    """
    units = {"asks": ("asks", 1.0), "s": ("seconds", 1.0), "m": ("seconds", 60.0), "h": ("seconds", 3600.0)}
    for unit, (kind, factor) in units.items():
        number = text.removesuffix(unit)
        if number != text:
            try:
                amount = float(number) * factor
            except ValueError:
                break
            if 0 < amount < float("inf"):
                return kind, amount
            break
    raise BadArgument(f"budget: got {text!r}, need a time or a number of asks above 0: 90s, 15m, 2h or 200000asks")


def afford(entries: Sequence[Entry], count: int, budget: str | None, test: Data) -> tuple[int, list[float]]:
    """How many images of each entry the budget affords, at most `count`, and the seconds an image takes.

    All entries have equally many, for FIDs compare at equal N only.

    Raises:
        BadArgument: the budget does not suffice for 50 of each, or for `count` if that is less.
    """
    seconds = [asks_of(entry.bundle) * pace(entry.bundle, test) for entry in entries]
    if budget is None:
        return count, seconds
    kind, amount = read_budget(budget)
    each = sum(seconds) if kind == "seconds" else float(sum(guided_asks_of(entry.bundle) for entry in entries))
    most, least = min(count, int(amount / each)), min(LEAST, count)
    if most < least:
        unit = "s" if kind == "seconds" else " asks"
        raise BadArgument(
            f"budget: {budget} is too little for {least} images of each of {len(entries)} entries, which take about "
            f"{least * each:.0f}{unit}; give more, fewer entries or fewer steps"
        )
    return most, seconds


def question_of(
    entries: Sequence[Entry], count: int, seed: int, budget: str | None, features: Part | None = None
) -> dict[str, Any]:
    """What is asked, as plain JSON: the same question in the same folder goes on."""
    asked = [{"label": entry.label, **identity(entry.bundle)} for entry in entries]
    about = {"entries": asked, "n": count, "seed": seed, "budget": budget}
    about |= {} if features is None else {"features": [features.name, features.knobs]}
    whole: dict[str, Any] = json.loads(json.dumps(about))
    return whole


def read_plan(out: Path, question: dict[str, Any]) -> dict[str, Any] | None:
    """What was planned for this question before; None in a new folder.

    Raises:
        BadArgument: the folder holds something else, or the answer to another question.
        BadData: a plan that cannot be read.
    """
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return None
    if not (out / "plan.json").is_file():
        raise BadArgument(f"{out}: is not the folder of a comparison; choose another --out")
    try:
        known = json.loads((out / "plan.json").read_text(encoding="utf-8"))
    except ValueError:
        known = None
    if not isinstance(known, dict):
        raise BadData(f"{out / 'plan.json'}: cannot be read; delete the folder and begin again")
    if known.get("question") != question:
        raise BadArgument(f"{out}: holds another comparison; choose another --out")
    return known
