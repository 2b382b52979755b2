"""The options that several commands share, and how a command takes all of those about sampling at once."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Annotated, Any, NamedTuple, get_type_hints

import typer

__all__ = [
    "Attribute",
    "Checkpoint",
    "Clip",
    "Combine",
    "Device",
    "Features",
    "GridName",
    "Guidance",
    "Guide",
    "Judge",
    "Match",
    "MaxSteps",
    "MaxTime",
    "Metric",
    "NoiseKind",
    "Options",
    "Out",
    "Sampler",
    "Seed",
    "Set",
    "Steps",
    "Text",
    "Trust",
    "Weak",
    "Weights",
    "with_options",
]

Set = Annotated[list[str] | None, typer.Option("--set", metavar="SLOT.KNOB=VALUE", help="Change a knob; repeatable.")]
Out = Annotated[Path | None, typer.Option(help="Folder to write; must be new.")]
Checkpoint = Annotated[Path, typer.Argument(help="A run folder, or a checkpoint in it.")]
MaxSteps = Annotated[int | None, typer.Option(help="Stop after so many updates in all.")]
MaxTime = Annotated[float | None, typer.Option(help="Stop after so many seconds.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, ...")]
Sampler = Annotated[str | None, typer.Option(help="Sampler; see: inkdrop list samplers.")]
GridName = Annotated[str | None, typer.Option("--grid", help="Spacing of levels; see: inkdrop list grids.")]
Steps = Annotated[int | None, typer.Option(help="Steps of the sampler.")]
Guidance = Annotated[
    float | None, typer.Option(help="Guidance scale: 1 conditional, 0 unconditional, more is stronger.")
]
Guide = Annotated[
    list[str] | None, typer.Option(help="Add a guide; none: drop the model's own. See: inkdrop list guide.")
]
Combine = Annotated[str | None, typer.Option(help="Combinator round the sampler, or none.")]
NoiseKind = Annotated[str | None, typer.Option("--noise", help="white, or brownian (one path whatever the steps).")]
Weak = Annotated[Path | None, typer.Option(help="A weaker run or checkpoint, for autoguidance.")]
Judge = Annotated[Path | None, typer.Option("--classifier", help="A classifier's folder, for classifier guidance.")]
Clip = Annotated[bool | None, typer.Option("--clip/--no-clip", help="Clip x0 to the data's range.")]
Weights = Annotated[str, typer.Option(help="ema (averaged) or raw.")]
Seed = Annotated[int | None, typer.Option(help="Seed; image i of a seed is the same at any count. Default: the run's.")]
Features = Annotated[
    str | None, typer.Option(metavar="NAME", help="What to compare: inkdrop list features; knobs: features.*")
]
Metric = Annotated[
    list[str] | None, typer.Option(metavar="NAME", help="Measure this too; repeatable: inkdrop list metrics.")
]
Match = Annotated[
    str | None,
    typer.Option(metavar="NAME", help="Whether samples show their texts: inkdrop list matches; knobs: match.*"),
]
Trust = Annotated[bool, typer.Option("--trust", help="Allow its files to import code from outside inkdrop.")]


Text = Annotated[list[str] | None, typer.Option(help="What to draw; repeatable: in turn. For models that read.")]
Attribute = Annotated[list[str] | None, typer.Option(metavar="NAME=VALUE", help="A continuous attribute; repeatable.")]


class Options(NamedTuple):
    """What every editing command takes: how to sample, and where to write."""

    label: Annotated[
        list[str] | None, typer.Option("--class", help="Class number or name; repeatable: in turn. Default: none.")
    ] = None
    text: Text = None
    attribute: Attribute = None
    sampler: Sampler = None
    steps: Steps = None
    grid: GridName = None
    guidance: Guidance = None
    clip: Clip = None
    guide: Guide = None
    combine: Combine = None
    noise: NoiseKind = None
    weak: Weak = None
    classifier: Judge = None
    seed: Seed = None
    settings: Set = None
    weights: Weights = "ema"
    out: Out = None
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an older folder of this kind.")] = False
    trust: Trust = False
    device: Device = "auto"


def with_options(command: Callable[..., None]) -> Callable[..., None]:
    """A command that takes `options: Options` as its last parameter, with each of them as an option of its own."""
    hints = get_type_hints(Options, include_extras=True)
    own = [p for p in inspect.signature(command, eval_str=True).parameters.values() if p.name != "options"]
    shared = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=hints[name])
        for name, default in Options._field_defaults.items()
    ]

    @wraps(command)
    def run(**given: Any) -> None:
        options = Options(**{p.name: given.pop(p.name) for p in shared})
        command(**given, options=options)

    parameters = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in own] + shared
    vars(run)["__signature__"] = inspect.Signature(parameters)
    run.__annotations__ = {p.name: p.annotation for p in parameters}
    return run
