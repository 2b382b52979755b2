"""Measures: what `inkdrop eval` measures besides FID, KID, classes and copies, and on which features."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from inkdrop.errors import BadArgument
from inkdrop.find import Part, check_knobs, find, parse

__all__ = ["Measures", "measures_of"]


class Measures(NamedTuple):
    """What is measured.

    Attributes:
        features: the extractor; None for the best without a download.
        metrics: besides FID, KID, classes and copies.
        match: the judge of pictures and texts, of a model that reads; None for none.
    """

    features: Part | None = None
    metrics: tuple[Part, ...] = ()
    match: Part | None = None


def measures_of(
    features: str | None, metrics: Sequence[str], settings: Iterable[str], match: str | None = None
) -> tuple[Measures, list[str]]:
    """What a command's options say of it, and the settings that are of something else.

    Args:
        features: the name of an extractor, or None.
        metrics: names of metrics.
        settings: "features.weights=FILE", "prdc.k=3", "match.model=FOLDER" and others.
        match: the name of a judge of pictures and texts, or None.

    Raises:
        UnknownName: no such extractor, metric, judge or knob.
        BadArgument: a metric twice, a value that does not fit, or a knob of what was not asked for.
    """
    if twice := {name for name in metrics if metrics.count(name) > 1}:
        raise BadArgument(f"eval metric: got {', '.join(sorted(twice))} twice, need each once")
    given: dict[str, dict[str, Any]] = {"features": {}, "match": {}, **{name: {} for name in metrics}}
    rest = []
    for text in settings:
        path, sign, value = text.partition("=")
        slot, _, knob = path.strip().partition(".")
        if slot not in given or not sign:
            rest.append(text)
        else:
            given[slot][knob] = parse(value.strip())
    for slot, name in (("features", features), ("match", match)):
        if name is None and given[slot]:
            raise BadArgument(f"--set {slot}.{next(iter(given[slot]))}: of which {slot}? add --{slot} NAME first")
    parts = tuple(Part(name, check_knobs(name, find("metrics", name), given[name])) for name in metrics)
    chosen = [
        None if name is None else Part(name, check_knobs(name, find(room, name), given[slot], slot))
        for name, room, slot in ((features, "features", "features"), (match, "matches", "match"))
    ]
    return Measures(chosen[0], parts, chosen[1]), rest
