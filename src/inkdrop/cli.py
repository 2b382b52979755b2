"""The command line: thin; each command says what it does and hands over to the house."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from contextlib import nullcontext, redirect_stdout
from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TextIO

import typer

from inkdrop import __version__
from inkdrop.cli_edit import edit
from inkdrop.cli_eval import compare, evaluate
from inkdrop.cli_hub import hub
from inkdrop.cli_parts import make_ema, train_autoencoder, train_classifier
from inkdrop.errors import BadArgument, Busy, Cancelled, InkdropError, Lost
from inkdrop.options import (
    Attribute,
    Checkpoint,
    Clip,
    Combine,
    Device,
    GridName,
    Guidance,
    Guide,
    Judge,
    MaxSteps,
    MaxTime,
    NoiseKind,
    Out,
    Sampler,
    Seed,
    Set,
    Steps,
    Text,
    Trust,
    Weak,
    Weights,
)
from inkdrop.parallel import is_first, is_many, ranks

if TYPE_CHECKING:
    from inkdrop.bundle import Bundle

__all__ = ["app", "main"]

app = typer.Typer(
    name="inkdrop",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Train, sample and evaluate your own diffusion models.",
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
data = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="Look at data before training on them.")
app.add_typer(data, name="data")
app.add_typer(edit, name="edit")
app.add_typer(hub, name="hub")


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"inkdrop {__version__}")
        raise typer.Exit


_OF_MANY = ("train", "resume", "sample", "eval")
"""The commands whose work several processes of one job share."""


@app.callback()
def _root(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Train, sample and evaluate your own diffusion models."""
    if is_many() and context.invoked_subcommand not in _OF_MANY:
        raise BadArgument(
            f"{context.invoked_subcommand}: got several processes (torchrun), which {', '.join(_OF_MANY)} alone share; "
            "start one, without torchrun"
        )


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for the report; an older demo in it is replaced.")] = Path("demo"),
    updates: Annotated[int, typer.Option(help="Updates of each of the two models.")] = 1500,
    samples: Annotated[int, typer.Option(help="How many DDIM-50 samples to score.")] = 2048,
) -> None:
    """Train, sample and score small digits; write a report.

    demo/report.html, in under 5 minutes on 2 cores.
    """
    from inkdrop.demo.run import run_demo
    from inkdrop.screen import Screen

    with Screen("the same command begins again") as screen:
        report = run_demo(out, updates=updates, samples=samples, screen=screen)
    typer.echo(f"report: {report}")


@app.command()
def train(
    recipe: Annotated[str, typer.Argument(help="A recipe's name (inkdrop list recipes), or a recipe.json.")],
    data: Annotated[Path | None, typer.Option(help="Your data: a folder, a .zip, or IDX files.")] = None,
    out: Out = None,
    codec: Annotated[Path | None, typer.Option(help="A trained autoencoder's folder: train in its latents.")] = None,
    settings: Set = None,
    max_steps: MaxSteps = None,
    max_time: MaxTime = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print recipe, parameters, memory and time; train nothing.")
    ] = False,
    device: Device = "auto",
    speed: Annotated[
        str, typer.Option(help="auto: measure ways of training first, and take the fastest; none: as the recipe says.")
    ] = "none",
    trust: Trust = False,
) -> None:
    """Train a recipe in a new run folder.

    The folder is runs/RECIPE unless --out names another.
    """
    from inkdrop.screen import Screen, print_dry_run
    from inkdrop.train.dry import dry_run as look
    from inkdrop.train.loop import check_speed, choose, fit

    how = check_speed(speed, train=not dry_run)
    made = choose(recipe, data=data, settings=settings or (), trust=trust)
    made = made if codec is None else replace(made, codec=str(codec.resolve()))
    if dry_run:
        return print_dry_run(made, look(made, device, process=True, trust=trust))
    target = out or Path("runs") / Path(recipe).stem
    with Screen("that was before the first update, so there is nothing to resume") as screen:
        words: dict[str, Any] = {"device": device, "speed": how, "trust": trust}
        words |= {"max_steps": max_steps, "max_time": max_time, "heard": screen.training(seconds=max_time)}
        bundle = _kept(lambda: fit(made, target, **words))
    return _say_next(target, bundle)


def _kept(training: Callable[[], Bundle]) -> Bundle:
    """The model of a training; of one that a signal ended in good order, as far as it came."""
    from inkdrop.train.interrupt import Stopped

    try:
        return training()
    except Stopped as stop:
        return stop.bundle


def _say_next(run: Path, bundle: Bundle) -> None:
    """Where the run is, and what to do with it; before the end of its recipe a model is half trained."""
    updates, steps, pair = bundle.card["updates"], bundle.recipe.train.steps, bundle.pair
    how = "-n 16" if pair is None else "--image PICTURE --mask MASK" if pair.masked else "--image PICTURE"
    typer.echo(f"trained: {run}, {updates:,} of {steps:,} updates\nnext:    inkdrop sample {run} {how}")
    if updates < steps:
        typer.echo(f"or:      inkdrop resume {run}")


@app.command()
def resume(
    run: Annotated[Path, typer.Argument(help="A run folder.")],
    data: Annotated[Path | None, typer.Option(help="Where the data are, if they moved.")] = None,
    settings: Set = None,
    max_steps: MaxSteps = None,
    max_time: MaxTime = None,
    device: Device = "auto",
    trust: Trust = False,
) -> None:
    """Go on with a run from its newest checkpoint.

    --set train.steps=... lengthens it.
    """
    from inkdrop.screen import Screen
    from inkdrop.train import loop

    with Screen("the run is as it was") as screen:
        words: dict[str, Any] = {"data": data, "settings": settings or (), "device": device, "trust": trust}
        words |= {"max_steps": max_steps, "max_time": max_time, "heard": screen.training(seconds=max_time)}
        bundle = _kept(lambda: loop.resume(run, **words))
    _say_next(run, bundle)


@app.command()
def sample(
    checkpoint: Checkpoint,
    n: Annotated[int, typer.Option("-n", "--number", help="How many.")] = 16,
    label: Annotated[
        list[str] | None, typer.Option("--class", help="Class number or name; repeatable: in turn.")
    ] = None,
    text: Text = None,
    negative: Annotated[list[str] | None, typer.Option(help="What to steer away from, by --guidance.")] = None,
    attribute: Attribute = None,
    image: Annotated[
        list[Path] | None, typer.Option(help="Picture to start from; repeatable: in turn. For models that take one.")
    ] = None,
    mask: Annotated[Path | None, typer.Option(help="White where the picture is kept, to fill the rest.")] = None,
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
    seed: Seed = None,
    settings: Set = None,
    weights: Weights = "ema",
    out: Out = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an older sample folder.")] = False,
    trust: Trust = False,
    device: Device = "auto",
) -> None:
    """Draw samples from a trained model.

    A new folder (./samples unless --out names another) gets grid.png, sample.json and the single images;
    samples.npy in their place where they are no pictures.
    """
    from inkdrop import jobs
    from inkdrop.files import refuse_folder
    from inkdrop.said import Said, told_of
    from inkdrop.screen import Screen

    bundle = jobs.open_bundle(checkpoint, weights, trust, device, weak, classifier)
    changes: dict[str, Any] = {"sampler": sampler, "steps": steps, "grid": grid, "guidance": guidance, "clip": clip}
    changes |= {"guide": guide or None, "combine": combine, "noise": noise}
    bundle = jobs.with_plan(bundle, changes, settings or ())
    target, model = out or Path("samples"), {"path": str(checkpoint), "weights": weights}
    refuse_folder(target, overwrite)
    said = Said(label, text, attribute, image, mask, negative)
    told = told_of(bundle, said, n)
    with Screen() as screen:
        used = bundle.recipe.train.seed if seed is None else seed
        x = jobs.draw(bundle, n, used, told, screen)
    ranks().lead(lambda: jobs.write_samples(x, target, bundle, used, said, overwrite, model))
    typer.echo(f"samples: {target}/grid.png")


app.command("eval")(evaluate)
app.command("compare")(compare)
app.command("classifier")(train_classifier)
app.command("autoencoder")(train_autoencoder)
app.command("ema")(make_ema)


@app.command()
def show(checkpoint: Checkpoint) -> None:
    """Say what a run, a checkpoint or an autoencoder holds."""
    from inkdrop.bundle import locate, read_manifest
    from inkdrop.codec import CARD, load_codec
    from inkdrop.screen import print_card, print_codec

    if (checkpoint / CARD).is_file():
        return print_codec(checkpoint, load_codec(checkpoint))
    folder = locate(checkpoint)
    return print_card(folder, read_manifest(folder))


@app.command("list")
def list_parts(
    room: Annotated[str | None, typer.Argument(help="samplers, nets, recipes, ...")] = None,
    name: Annotated[str | None, typer.Argument(help="One of them, for its knobs.")] = None,
) -> None:
    """List rooms, what one holds, or a part's knobs."""
    from inkdrop.screen import print_knobs, print_room, print_rooms

    if room is None:
        print_rooms()
    elif name is None:
        print_room(room)
    else:
        print_knobs(room, name)


@data.command("check")
def check(path: Annotated[Path, typer.Argument(help="A folder of images, a .zip, or IDX files.")]) -> None:
    """Read every file of a data set and say what is there.

    Sizes, classes, captions, duplicates, and the files that cannot be read; exit code 2 if it cannot be trained on.
    """
    from inkdrop.data.survey import survey

    found = survey(path)
    typer.echo(found.text())
    if not found.command:
        raise typer.Exit(2)


def main(argv: list[str] | None = None) -> Any:
    """Run the command line; an error that the caller can put right is one line on stderr and exit code 2.

    Of the ranks of a job only the first prints; an error that they have talked about is said once.
    """
    try:
        with warnings.catch_warnings(), nullcontext() if is_first() else redirect_stdout(StringIO()):
            warnings.showwarning = _warn
            return app(args=argv, standalone_mode=True)
    except InkdropError as error:
        if not error.echo:
            typer.echo(f"inkdrop: {error}", err=True)
    except (Busy, Cancelled, Lost) as error:
        typer.echo(f"inkdrop: {error}", err=True)
    except OSError as error:  # a full disk, a file without permission
        typer.echo(f"inkdrop: {error.filename or 'file'}: {error.strerror or error}", err=True)
    sys.exit(2)


def _warn(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    """Show a warning as one line: where in the house it was raised is nothing to its user."""
    if is_first():
        typer.echo(f"inkdrop: warning: {message}", err=True)


if __name__ == "__main__":
    main()
