"""A name -> the function; its signature -> its knobs. The folder is the registry.

A findable is a public top-level function whose positional parameters are those of its room; its keyword-only
parameters, with their annotations and defaults, are its knobs. Listing names reads the source only: nothing is
imported, so the command line's help stays fast.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Literal, NamedTuple

from inkdrop.errors import BadArgument, UnknownName

__all__ = ["ROOMS", "Part", "build", "check_knobs", "find", "knobs", "listing", "names", "order_of", "parse"]

HOUSE = Path(__file__).parent


class Room(NamedTuple):
    """Where functions of one kind live, and by which positional parameters they are known."""

    where: str
    positional: tuple[tuple[str, ...], ...]


ROOMS: dict[str, Room] = {
    "samplers": Room("samplers", (("x", "grid", "noise"),)),
    "combinators": Room("samplers", (("sampler", "x", "grid", "noise"),)),
    "guide": Room("guide", (("sampling",),)),
    "operators": Room("edit/operators.py", (("shape",),)),
    "pairs": Room("edit/pairs.py", (("shape",),)),
    "readers": Room("reader.py", (("texts", "files"),)),
    "schedules": Room("core/schedule.py", ((),)),
    "targets": Room("core/target.py", ((), ("schedule",))),
    "grids": Room("core/grid.py", (("schedule", "steps"),)),
    "nets": Room("nets", (("shape",),)),
    "codecs": Room("nets", (("pixels",),)),
    "clocks": Room("core/clock.py", (("level",),)),
    "scales": Room("core/scale.py", (("level",),)),
    "data": Room("data", (("split",),)),
    "augmentations": Room("data/augment.py", (("x0", "draw"),)),
    "losses": Room("losses", (("denoiser", "x0", "cond", "draw"),)),
    "times": Room("losses/times.py", (("u", "schedule"),)),
    "weights": Room("losses/weights.py", (("lam",),)),
    "recipes": Room("recipes", ((),)),
    "features": Room("evals/extractors.py", (("train", "test", "on_progress"),)),
    "metrics": Room("evals/metrics.py", (("real", "made"),)),
    "matches": Room("evals/matches.py", (("train",),)),
}


@dataclass(frozen=True)
class Part:
    """A function by name, and the knobs to call it with: what recipes and checkpoints are made of."""

    name: str
    knobs: dict[str, Any] = field(default_factory=dict)


class Entry(NamedTuple):
    """One line of a room's listing."""

    module: str
    summary: str


def _room(room: str) -> Room:
    if room not in ROOMS:
        raise UnknownName("room", room, ROOMS)
    return ROOMS[room]


@cache
def listing(room: str) -> dict[str, Entry]:
    """name -> (module, first line of its docstring) of everything in a room, in order of name; imports nothing.

    Raises:
        UnknownName: no such room.
    """
    where, positional = _room(room)
    path = HOUSE / where
    found: dict[str, Entry] = {}
    for file in [path] if path.suffix else sorted(path.glob("*.py")):
        module = ".".join(("inkdrop", *file.relative_to(HOUSE).with_suffix("").parts))
        for node in ast.parse(file.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
                args = tuple(a.arg for a in (*node.args.posonlyargs, *node.args.args))
                if args in positional and node.args.vararg is None:
                    found[node.name] = Entry(module, (ast.get_docstring(node) or "").split("\n")[0])
    return dict(sorted(found.items()))


def names(room: str) -> list[str]:
    """Everything in a room, sorted."""
    return list(listing(room))


def find(room: str, name: str) -> Callable[..., Any]:
    """The function of this name in a room, or of "my.module:thing" outside the house.

    Raises:
        UnknownName: no such room, function or module; the nearest names are given.
    """
    known = listing(room)
    if ":" in name:
        module, _, attribute = name.partition(":")
        if not all(part.isidentifier() for part in (*module.split("."), attribute)):
            raise BadArgument(f"{room}: got {name!r}, need one of {', '.join(known)}, or my.module:thing")
        try:
            thing = getattr(importlib.import_module(module), attribute)
        except (ImportError, AttributeError) as error:
            raise UnknownName(f"{room} {name!r} ({error})", name, known) from None
        if not callable(thing):
            raise BadArgument(f"{room} {name!r}: is not a function")
        result: Callable[..., Any] = thing
        return result
    if name not in known:
        elsewhere = next((other for other in ROOMS if name in listing(other)), None)
        if elsewhere is not None:
            raise BadArgument(f"{room}: got {name!r}, which is one of the {elsewhere}; see: inkdrop list {elsewhere}")
        raise UnknownName(room, name, known)
    found: Callable[..., Any] = getattr(importlib.import_module(known[name].module), name)
    return found


def order_of(part: Part) -> int | None:
    """The order of convergence of a sampler with its knobs, as its paper states it; weak where it is stochastic.

    ORDER in the sampler's file is a number, or a mapping from each name of the family to its own; in place of a number
    may stand a function of the knobs. A knob named `order` says otherwise. None: the paper claims none.
    """
    function = find("samplers", part.name)
    stated = vars(inspect.getmodule(function))["ORDER"]
    stated = stated[part.name] if isinstance(stated, Mapping) else stated
    order: int | None = stated(**part.knobs) if callable(stated) else part.knobs.get("order", stated)
    return order


def knobs(function: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    """The keyword-only parameters of a function, with evaluated annotations."""
    hints = typing.get_type_hints(function)
    params = inspect.signature(function).parameters.values()
    return {p.name: p.replace(annotation=hints.get(p.name, Any)) for p in params if p.kind is p.KEYWORD_ONLY}


def check_knobs(
    what: str, function: Callable[..., Any], given: Mapping[str, Any], slot: str | None = None
) -> dict[str, Any]:
    """The given knobs, checked and converted by pydantic to the function's annotations ("0.5" -> 0.5).

    Args:
        what: whose they are, for messages.
        function: whose they are.
        given: name -> value.
        slot: what `--set` calls it, where that is not its name.

    Raises:
        UnknownName: the function has no such knob.
        BadArgument: a value does not fit its annotation, or a knob without default is missing.
    """
    from pydantic import TypeAdapter, ValidationError

    known, out = knobs(function), {}
    for name, value in given.items():
        if name not in known:
            raise UnknownName(f"{what} knob", name, known)
        try:
            out[name] = TypeAdapter(known[name].annotation).validate_python(value)
        except ValidationError as error:
            need, reason = inspect.formatannotation(known[name].annotation), error.errors()[0]["msg"]
            if typing.get_origin(known[name].annotation) is Literal:
                choices = " or ".join(map(str, typing.get_args(known[name].annotation)))
                raise BadArgument(f"{what}.{name}: got {value!r}, need {choices}") from None
            raise BadArgument(f"{what}.{name}: got {value!r}, need {need} ({reason})") from None
    for name, param in known.items():
        if param.default is param.empty and name not in out:
            hint = "--data PATH" if name == "data" else f"--set {slot or what}.{name}=..."
            raise BadArgument(f"{what}: needs a value for {name!r}; give {hint}")
    return out


def build(room: str, part: Part, *positional: Any, **house: Any) -> Any:
    """Call a findable with its positional arguments, its checked knobs, and what the house knows if it takes it.

    Args:
        room: where it lives.
        part: its name and knobs.
        positional: its room's arguments; one too many for it is left out (a target that needs no schedule).
        house: keyword arguments passed only where the function has such a parameter (classes=10).
    """
    function = find(room, part.name)
    slots = {"combinators": "combine", "readers": "text", "pairs": "image", "features": "features"}
    slot = None if room == "guide" else slots.get(room, room.removesuffix("s"))
    given = check_knobs(part.name, function, {**_accepted(function, house, part.knobs), **part.knobs}, slot)
    takes = [p for p in inspect.signature(function).parameters.values() if p.kind is not p.KEYWORD_ONLY]
    return function(*positional[: len(takes)], **given)


def _accepted(function: Callable[..., Any], house: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    known = knobs(function)
    return {name: value for name, value in house.items() if name in known and name not in given}


def parse(text: str) -> Any:
    """A value of the command line: JSON where it is JSON ("0.5", "true", "[1, 2]"), "1,2,2" a list, else text."""
    import json

    try:
        return json.loads(text)
    except ValueError:
        parts = text.split(",")
        return [parse(p) for p in parts] if len(parts) > 1 else text
