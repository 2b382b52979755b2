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
    """

    features: Part | None = None
    metrics: tuple[Part, ...] = ()


def measures_of(features: str | None, metrics: Sequence[str], settings: Iterable[str]) -> tuple[Measures, list[str]]:
    """What a command's options say of it, and the settings that are of something else.

    Args:
        features: the name of an extractor, or None.
        metrics: names of metrics.
        settings: "features.weights=FILE", "prdc.k=3" and others.

    Raises:
        UnknownName: no such extractor, metric or knob.
        BadArgument: a metric twice, a value that does not fit, or a knob of what was not asked for.
    """
    if twice := {name for name in metrics if metrics.count(name) > 1}:
        raise BadArgument(f"eval metric: got {', '.join(sorted(twice))} twice, need each once")
    given: dict[str, dict[str, Any]] = {"features": {}, **{name: {} for name in metrics}}
    rest = []
    for text in settings:
        path, sign, value = text.partition("=")
        slot, _, knob = path.strip().partition(".")
        if slot not in given or not sign:
            rest.append(text)
        else:
            given[slot][knob] = parse(value.strip())
    if features is None and given["features"]:
        raise BadArgument(
            f"--set features.{next(iter(given['features']))}: of which features? add --features NAME first"
        )
    parts = tuple(Part(name, check_knobs(name, find("metrics", name), given[name])) for name in metrics)
    extractor = None
    if features is not None:
        extractor = Part(features, check_knobs(features, find("features", features), given["features"], "features"))
    return Measures(extractor, parts), rest
