"""The commands that score models and compare them: `inkdrop eval` and `inkdrop compare`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from inkdrop.errors import BadArgument
from inkdrop.options import (
    Checkpoint,
    Clip,
    Combine,
    Device,
    Features,
    GridName,
    Guidance,
    Guide,
    Judge,
    Match,
    Metric,
    NoiseKind,
    Sampler,
    Seed,
    Set,
    Steps,
    Trust,
    Weak,
    Weights,
)
from inkdrop.parallel import ranks

__all__ = ["compare", "evaluate"]


def evaluate(
    checkpoint: Checkpoint,
    n: Annotated[
        int | None, typer.Option("-n", "--number", help="How many samples (1000), or held-out images for --nll (64).")
    ] = None,
    nll: Annotated[bool, typer.Option("--nll", help="Bits a dimension of held-out data instead; knobs: nll.*")] = False,
    data: Annotated[Path | None, typer.Option(help="Where the data are, if they moved since training.")] = None,
    sampler: Sampler = None,
    steps: Steps = None,
    grid: GridName = None,
    guidance: Guidance = None,
    clip: Clip = None,
    guide: Guide = None,
    combine: Combine = None,
    noise: NoiseKind = None,
    weak: Weak = None,
    classifier: Judge = None,
    features: Features = None,
    metric: Metric = None,
    match: Match = None,
    seed: Seed = None,
    settings: Set = None,
    weights: Weights = "ema",
    out: Annotated[Path | None, typer.Option(help="Also write the figures to this JSON file.")] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the figures as one line of JSON, not as a table.")
    ] = False,
    trust: Trust = False,
    device: Device = "auto",
) -> None:
    """Score a model, with real data beside it.

    FID, KID, classes, sureness, and copies of training images. Stopped at any time, the same command goes on.
    """
    from inkdrop import eval_jobs, jobs
    from inkdrop.files import refuse_file
    from inkdrop.measures import measures_of
    from inkdrop.screen import Screen, print_likelihood, print_scores

    bundle = jobs.open_bundle(checkpoint, weights, trust, device, weak, classifier)
    changes: dict[str, Any] = {"sampler": sampler, "steps": steps, "grid": grid, "guidance": guidance, "clip": clip}
    changes |= {"guide": guide or None, "combine": combine, "noise": noise}
    measures, settings = measures_of(features, metric or (), settings or (), match)
    if nll and any(measures):
        raise BadArgument("eval --nll: features, metric and match have no effect on likelihood; leave them out")
    if not nll:
        bundle = jobs.with_plan(bundle, changes, settings)
    used = bundle.recipe.train.seed if seed is None else seed
    if out is not None:
        refuse_file(out)
    count = n if n is not None else 64 if nll else 1000
    with Screen("the same command goes on from here") as screen:
        if nll:
            figures = eval_jobs.likelihood_of(bundle, count, used, data, changes, settings, screen)
        else:
            figures = eval_jobs.score_bundle(bundle, count, used, data, screen, measures)
    figures |= {"model": {"path": str(checkpoint), "weights": weights}}
    if as_json:
        typer.echo(json.dumps(figures, allow_nan=False))
    else:
        (print_likelihood if nll else print_scores)(figures)
    if out is not None:
        ranks().lead(lambda: jobs.write_figures(figures, out))


def compare(
    checkpoints: Annotated[list[Path], typer.Argument(help="Run folders, or checkpoints, of one data set.")],
    n: Annotated[int, typer.Option("-n", "--number", help="Samples of each entry, at most.")] = 1000,
    data: Annotated[Path | None, typer.Option(help="Where the data are, if they moved since training.")] = None,
    sampler: Annotated[list[str] | None, typer.Option(help="Sampler; repeatable: each is an entry.")] = None,
    steps: Annotated[list[int] | None, typer.Option(help="Steps; repeatable: each is an entry.")] = None,
    guidance: Annotated[list[float] | None, typer.Option(help="Guidance scale; repeatable: each is an entry.")] = None,
    budget: Annotated[
        str | None, typer.Option(help="Sample no more than this takes: 90s, 15m, 2h or 200000asks.")
    ] = None,
    features: Features = None,
    seed: Annotated[int, typer.Option(help="Of the noise, the same for all.")] = 0,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="features.KNOB=VALUE", help="A knob of the features; repeatable."),
    ] = None,
    weights: Weights = "ema",
    out: Annotated[Path, typer.Option(help="Folder of the report; that of the same comparison goes on.")] = Path(
        "compare"
    ),
    trust: Trust = False,
    device: Device = "auto",
) -> None:
    """Compare models, samplers, steps and guidance scales, from the same noise.

    Every checkpoint with every sampler, number of steps and scale. Writes OUT/report.html, report.md and compare.json.
    """
    from inkdrop import jobs
    from inkdrop.compare.question import names_of
    from inkdrop.compare.run import run_compare
    from inkdrop.measures import measures_of
    from inkdrop.screen import Screen

    measures, rest = measures_of(features, (), settings or ())
    if rest:
        raise BadArgument(f"compare --set: got {rest[0]!r}, need features.KNOB=VALUE; models are compared as they are")
    models = zip(names_of(checkpoints), checkpoints, strict=True)
    bundles = [(name, jobs.open_bundle(path, weights, trust, device)) for name, path in models]
    ways: dict[str, Any] = {"samplers": sampler or (), "steps": steps or (), "guidance": guidance or ()}
    with Screen("the same command goes on from here") as screen:
        ways |= {"budget": budget, "features": measures.features}
        report = run_compare(bundles, out, data=data, count=n, seed=seed, screen=screen, **ways)
    typer.echo(f"report: {report}")
