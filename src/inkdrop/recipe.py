"""Recipe: everything that makes a run, as names and knobs; a run can be repeated from its recipe.json alone."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import Any, get_args, get_origin

import torch

from inkdrop.core.check import check_end
from inkdrop.core.cond import Terms
from inkdrop.core.dataset import Data
from inkdrop.denoiser import Denoiser
from inkdrop.errors import BadArgument, BadData, InkdropError, UnknownName
from inkdrop.find import Part, build, check_knobs, find, knobs, parse
from inkdrop.plan import Plan, change
from inkdrop.settings import Train

__all__ = [
    "Recipe",
    "denoiser_of",
    "dump",
    "open_data",
    "read",
    "refuse_foreign_code",
    "set_knobs",
    "valid",
    "with_knob",
]


@dataclass(frozen=True)
class Recipe:
    """A run as (name, knobs) pairs, each found in its room.

    Attributes:
        data: the data set; None for a model that was made elsewhere, which can be sampled but not trained further.
        net: the network.
        schedule: the noise levels.
        target: what the net predicts.
        clock: what it is told about time.
        scale: the factor on its input.
        loss: what is minimised.
        text: how the data's captions are read; None where the model reads none.
        image: what is made of each picture as its image condition; None where there is none.
        augment: how pictures are changed at random before a net is trained on them, in this order; () if they are not.
        codec: the folder of a trained autoencoder in whose latents the model works; None for the data themselves.
        train: how.
        plan: how to sample what was trained.
    """

    data: Part | None
    net: Part
    schedule: Part = field(default_factory=lambda: Part("cosine"))
    target: Part = field(default_factory=lambda: Part("v"))
    clock: Part = field(default_factory=lambda: Part("table"))
    scale: Part = field(default_factory=lambda: Part("unit"))
    loss: Part = field(default_factory=lambda: Part("simple"))
    text: Part | None = None
    image: Part | None = None
    augment: tuple[Part, ...] = ()
    codec: str | None = None
    train: Train = field(default_factory=Train)
    plan: Plan = field(default_factory=Plan)


SLOTS = {
    "data": "data",
    "net": "nets",
    "schedule": "schedules",
    "target": "targets",
    "clock": "clocks",
    "scale": "scales",
    "loss": "losses",
    "text": "readers",
    "image": "pairs",
    "sampler": "samplers",
    "grid": "grids",
    "combine": "combinators",
}
"""The parts of a recipe that --set can name, and the rooms they come from."""


def set_knobs(recipe: Recipe, settings: Iterable[str]) -> Recipe:
    """A recipe changed by "slot=name", "slot.knob=value", "train.field=value", or "plan.field=value".

    Slots are those of SLOTS, codec (a folder, or none), augment (names, as augment=flip,crop, or none), and the names
    of the augmentations (crop.pad=3) and of the plan's guides (cfg.scale=2). A new name drops the old one's
    knobs; combine=none drops the combinator, text=none and image=none those conditions. The plan's fields are steps,
    noise (white, brownian, or null for the sampler's own) and guide: names (plan.guide=clip,cfg), of which those that
    were there keep their knobs, or none.

    Raises:
        UnknownName: no such slot, part or knob.
        BadArgument: not of the form slot.knob=value, or a value that does not fit.
    """
    for text in settings:
        path, sign, value = text.partition("=")
        slot, _, knob = path.strip().partition(".")
        if not sign or not slot:
            raise BadArgument(f"--set: got {text!r}, need slot.knob=value, as in sampler.eta=0.5, or slot=name")
        recipe = _set(recipe, slot, knob, parse(value.strip()))
    return recipe


def _set(recipe: Recipe, slot: str, knob: str, value: Any) -> Recipe:
    plan = recipe.plan
    if slot in ("train", "plan"):
        old = getattr(recipe, slot)
        allowed = [f.name for f in fields(old)] if slot == "train" else ["steps", "noise", "guide"]
        if knob not in allowed:
            raise UnknownName(f"{slot} knob", knob, allowed)
        if knob == "guide":
            return replace(recipe, plan=replace(plan, guide=_guide(plan, value)))
        return replace(recipe, **{slot: valid(type(old), {**_plain(old), knob: value}, slot)})
    if slot not in SLOTS and any(p.name == slot for p in plan.guide):
        guide = tuple(with_knob("guide", p, knob, value) if p.name == slot else p for p in plan.guide)
        return replace(recipe, plan=replace(plan, guide=guide))
    if slot not in SLOTS and any(p.name == slot for p in recipe.augment):
        parts = tuple(with_knob("augmentations", p, knob, value) if p.name == slot else p for p in recipe.augment)
        return replace(recipe, augment=parts)
    if slot == "augment":
        return replace(recipe, augment=_augment(recipe, knob, value))
    if slot == "codec":
        if knob:
            raise BadArgument(f"--set: got codec.{knob}, but a codec has no knobs; give its folder, as codec=PATH")
        return replace(recipe, codec=None if value == "none" else str(value))
    if slot not in SLOTS:
        raise UnknownName(
            "--set slot",
            slot,
            [*SLOTS, "augment", "codec", "train", "plan", *(p.name for p in (*recipe.augment, *plan.guide))],
        )
    if slot == "combine" and value == "none" and not knob:
        return replace(recipe, plan=replace(plan, combine=None))
    if slot in ("text", "image") and value == "none" and not knob:
        return replace(recipe, text=None) if slot == "text" else replace(recipe, image=None)
    of_plan = slot in ("sampler", "grid", "combine")
    part: Part | None = getattr(plan if of_plan else recipe, slot)
    if part is None and knob:
        raise BadArgument(
            f"--set: got {slot}.{knob}, but there is no {slot}; name one first, as in {slot}={_FIRST[slot]}"
        )
    changed: dict[str, Any] = {slot: with_knob(SLOTS[slot], part or Part(""), knob, value)}
    return replace(recipe, plan=replace(plan, **changed)) if of_plan else replace(recipe, **changed)


_FIRST = {"combine": "restart", "text": "bpe", "image": "lowres", "data": "folder"}
"""What to name for a slot that may be empty."""


def _names(value: Any) -> list[str]:
    """The names of a value of --set: one, a list, or none."""
    return [str(name) for name in value] if isinstance(value, list) else [] if value == "none" else [str(value)]


def _augment(recipe: Recipe, knob: str, value: Any) -> tuple[Part, ...]:
    """The augmentations of these names, in their order; those that were there keep their knobs."""
    if knob:
        raise BadArgument(
            f"--set: got augment.{knob}, need names, as augment=flip,crop; their knobs are flip.{knob}=..."
        )
    wanted = _names(value)
    for name in wanted:
        find("augmentations", name)
    own = {part.name: part for part in recipe.augment}
    return tuple(own.get(name, Part(name)) for name in wanted)


def _guide(plan: Plan, value: Any) -> tuple[Part, ...]:
    """The guides of these names, in their order; those that were there keep their knobs."""
    wanted = _names(value)
    for name in wanted:
        find("guide", name)
    own = {part.name: part for part in plan.guide}
    return change(plan, guide=["none", *(own.get(name, name) for name in wanted)]).guide


def with_knob(room: str, part: Part, knob: str, value: Any) -> Part:
    """The part with one knob changed, or another part if no knob is named; both checked at once.

    Raises:
        UnknownName: no such part or knob.
        BadArgument: a value that does not fit.
    """
    if not knob:
        find(room, str(value))
        return Part(str(value))
    function = find(room, part.name)
    if knob not in knobs(function):
        raise UnknownName(f"{part.name} knob", knob, knobs(function))
    if _is_list(knobs(function)[knob].annotation) and isinstance(value, (str, int, float)):
        value = [value]  # net.cross=1 is a list of one
    merged = {**part.knobs, knob: value}
    check_knobs(part.name, function, merged)
    return Part(part.name, merged)


def _is_list(kind: Any) -> bool:
    """Whether the values of an annotation are tuples only, or None."""
    kinds = [kind] if get_origin(kind) is tuple else [each for each in get_args(kind) if each is not type(None)]
    return bool(kinds) and all(get_origin(each) is tuple for each in kinds)


def _plain(thing: Any) -> Any:
    """Dataclasses as dicts, paths as text: what JSON can hold."""
    if is_dataclass(thing) and not isinstance(thing, type):
        return {f.name: _plain(getattr(thing, f.name)) for f in fields(thing)}
    if isinstance(thing, dict):
        return {name: _plain(value) for name, value in thing.items()}
    if isinstance(thing, (list, tuple)):
        return [_plain(value) for value in thing]
    return str(thing) if isinstance(thing, Path) else thing


def valid(kind: type, plain: Any, what: str) -> Any:
    """A dataclass from plain JSON, checked by pydantic; one line on error."""
    from pydantic import TypeAdapter, ValidationError

    try:
        return TypeAdapter(kind).validate_python(plain)
    except ValidationError as error:
        first = error.errors()[0]
        own = first.get("ctx", {}).get("error")
        if isinstance(own, InkdropError):
            raise own from None
        where = ".".join(str(p) for p in (what, *first["loc"]))
        if first["type"] == "missing":
            raise BadArgument(f"{where}: is missing; give it a value") from None
        got = repr(first.get("input"))
        raise BadArgument(f"{where}: got {got if len(got) < 80 else f'{got[:80]}…'} ({first['msg']})") from None


def dump(recipe: Recipe) -> dict[str, Any]:
    """The recipe as plain JSON."""
    plain: dict[str, Any] = _plain(recipe)
    return plain


def read(source: Path | dict[str, Any]) -> Recipe:
    """The recipe of a recipe.json, or of its content.

    Raises:
        BadData: the file cannot be read or is not JSON.
        BadArgument: a field is missing, unknown or of the wrong type.
    """
    if isinstance(source, Path):
        try:
            source = json.loads(source.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise BadData(f"recipe {source}: cannot be read as JSON ({error})") from None
    _refuse_unknown(Recipe, source, "recipe")
    recipe: Recipe = valid(Recipe, source, "recipe")
    return recipe


def _refuse_unknown(kind: type, plain: Any, what: str) -> None:
    """Refuse fields that a dataclass does not have: an option that has no effect is an error."""
    if not isinstance(plain, dict):
        raise BadArgument(f"{what}: got {type(plain).__name__}, need a JSON object")
    known = {f.name: f.type for f in fields(kind)}
    for name, value in plain.items():
        if name not in known:
            raise UnknownName(f"{what} field", name, known)
        inner = {"Part": Part, "Part | None": Part, "Train": Train, "Plan": Plan}.get(str(known[name]))
        if inner is not None and value is not None:
            _refuse_unknown(inner, value, f"{what}.{name}")
        if name in ("guide", "augment") and isinstance(value, list):
            for part in value:
                _refuse_unknown(Part, part, f"{what}.{name}")


def refuse_foreign_code(plain: dict[str, Any], where: Path, error: type[InkdropError] = BadArgument) -> None:
    """A file must not make us import code ("my.module:thing") that its reader did not choose, by name or knob.

    Args:
        plain: a recipe as plain JSON; the knobs of its data, which hold paths, are not looked at.
        where: the file, for the message.
        error: what to raise.
    """

    def look(thing: Any) -> None:
        if isinstance(thing, str) and ":" in thing:
            raise error(
                f"{where}: would import {thing}, code outside inkdrop; "
                "load it with trust=True (--trust) if you trust it"
            )
        for inner in thing.values() if isinstance(thing, dict) else thing if isinstance(thing, list) else ():
            look(inner)

    look({**plain, "data": plain["data"] and plain["data"]["name"], "codec": None})


def open_data(part: Part | None, split: str) -> Data:
    """The data set of a recipe: "train" or "test".

    Raises:
        BadArgument: a model that was made elsewhere, or a function from outside the house that gives something else.
    """
    if part is None:
        raise BadArgument("data: this model was made elsewhere, so its data are not known; give --data PATH")
    data = build("data", part, split)
    if not isinstance(data, Data):
        raise BadArgument(
            f"data {part.name}: gives a {type(data).__name__}, need a core.dataset.Data; see CONTRIBUTING"
        )
    return data


def denoiser_of(recipe: Recipe, shape: tuple[int, ...], terms: Terms) -> Denoiser:
    """The recipe's denoiser with fresh weights.

    Args:
        recipe: names net, schedule, target, clock and scale.
        shape: (C, *S) of one sample, as the net sees it.
        terms: how much of each condition there is; a net without such a knob is built without.

    Raises:
        BadArgument: parts that do not go together.
    """
    for name, count in terms._asdict().items():
        if (given := recipe.net.knobs.get(name, count)) != count:
            raise BadArgument(f"{recipe.net.name}.{name}: got {given}, but the data have {count}; leave it out")
    schedule = build("schedules", recipe.schedule)
    check_end(schedule)
    target = build("targets", recipe.target, schedule)
    target.check(schedule)
    net = build("nets", recipe.net, shape, **{name: count for name, count in terms._asdict().items() if count})
    if not isinstance(net, torch.nn.Module):
        raise BadArgument(f"net {recipe.net.name}: gives a {type(net).__name__}, need a torch.nn.Module")
    clock, scale = find("clocks", recipe.clock.name), find("scales", recipe.scale.name)
    own = {"steps": schedule.steps} if "steps" in knobs(clock) else {}
    clock_knobs = check_knobs(recipe.clock.name, clock, {**own, **recipe.clock.knobs})
    scale_knobs = check_knobs(recipe.scale.name, scale, recipe.scale.knobs)
    if not bool(torch.isfinite(clock(schedule(1.0), **clock_knobs))):
        raise BadArgument(
            f"clock {recipe.clock.name}: is infinite at t = 1, where this schedule has no signal (zero terminal SNR); "
            "try clock table or time"
        )
    return Denoiser(net, schedule, target, lambda lv: clock(lv, **clock_knobs), lambda lv: scale(lv, **scale_knobs))
