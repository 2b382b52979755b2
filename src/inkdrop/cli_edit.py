"""inkdrop edit: the commands that change pictures with a trained model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from inkdrop.options import Checkpoint, Options, with_options

__all__ = ["edit"]

edit = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode=None,
    help="Edit pictures: inpaint, outpaint, img2img, invert, interpolate, vary, restore.",
)

Pictures = Annotated[
    list[Path], typer.Argument(help="Pictures of the model's size (.png .jpg .npy ...), or its data as .npy.")
]
Resample = Annotated[int, typer.Option(help="RePaint: passes over each block of the grid; 1 is plain, 10 the paper's.")]
Jump = Annotated[int | None, typer.Option(help="RePaint: steps of a block. Default: 10.")]
Iterations = Annotated[int | None, typer.Option(help="Of the inversion's fixed point, at each step. Default: 3.")]


@edit.command()
@with_options
def inpaint(
    checkpoint: Checkpoint,
    pictures: Pictures,
    keep: Annotated[Path | None, typer.Option(help="Mask: white is kept, black is drawn anew.")] = None,
    repaint: Annotated[Path | None, typer.Option(help="Mask: white is drawn anew, black is kept.")] = None,
    resample: Resample = 1,
    jump: Jump = None,
    *,
    options: Options,
) -> None:
    """Draw a part of pictures anew.

    What the mask keeps is kept exactly. One mask for all pictures; give --keep or --repaint.
    """
    from inkdrop.edit_jobs import Desk

    desk = Desk("inpaint", checkpoint, options)
    images = desk.read(pictures)
    mask = desk.read_mask(keep, repaint)
    after = desk.run(images, mask, resample=resample, jump=jump)
    typer.echo(
        desk.write(after, before=[images.where(mask, images.new_zeros(()))], inputs=[*pictures, keep or repaint])
    )


@edit.command()
@with_options
def outpaint(
    checkpoint: Checkpoint,
    pictures: Pictures,
    left: Annotated[int, typer.Option(help="Pixels to add.")] = 0,
    right: Annotated[int, typer.Option(help="Pixels to add.")] = 0,
    top: Annotated[int, typer.Option(help="Pixels to add.")] = 0,
    bottom: Annotated[int, typer.Option(help="Pixels to add.")] = 0,
    windows: Annotated[
        bool | None, typer.Option("--windows/--whole", help="Ask in windows of the model's size, or as a whole.")
    ] = None,
    stride: Annotated[int | None, typer.Option(help="Pixels between windows. Default: half a window.")] = None,
    resample: Resample = 1,
    jump: Jump = None,
    *,
    options: Options,
) -> None:
    """Extend pictures beyond their edges.

    By default the model is asked about the whole new canvas if it can answer, else in windows.
    """
    from inkdrop.edit_jobs import Desk, padded

    desk = Desk("outpaint", checkpoint, options)
    images = desk.read(pictures)
    after = desk.run(
        images,
        left=left,
        right=right,
        top=top,
        bottom=bottom,
        windows=windows,
        stride=stride,
        resample=resample,
        jump=jump,
    )
    shown = padded(images, left=left, right=right, top=top, bottom=bottom)
    typer.echo(desk.write(after, before=[shown], inputs=pictures))


@edit.command()
@with_options
def img2img(
    checkpoint: Checkpoint,
    pictures: Pictures,
    strength: Annotated[float, typer.Option(help="How much is drawn anew: 0 nothing, 1 everything.")] = 0.6,
    *,
    options: Options,
) -> None:
    """Draw pictures like the given ones: noise is added and sampled away (SDEdit)."""
    from inkdrop.edit_jobs import Desk

    desk = Desk("img2img", checkpoint, options)
    images = desk.read(pictures)
    typer.echo(desk.write(desk.run(images, strength=strength), before=[images], inputs=pictures))


@edit.command()
@with_options
def invert(
    checkpoint: Checkpoint,
    pictures: Pictures,
    depth: Annotated[float, typer.Option(help="How far towards noise: in (0, 1].")] = 1.0,
    method: Annotated[str, typer.Option(help="naive, fixed-point or heun.")] = "fixed-point",
    iterations: Iterations = None,
    to: Annotated[str | None, typer.Option(help="Decode as this class instead of the one given by --class.")] = None,
    *,
    options: Options,
) -> None:
    """Find the noise that makes pictures, and make them of it again.

    noise.npy holds the noise; the pictures are what is made of it, and edit.json says how near they are.
    """
    from inkdrop.edit_jobs import Desk

    desk = Desk("invert", checkpoint, options)
    images = desk.read(pictures)
    after = desk.round_trip(images, to, depth=depth, method=method, iterations=3 if iterations is None else iterations)
    typer.echo(desk.write(after, before=[images], inputs=pictures))


@edit.command()
@with_options
def interpolate(
    checkpoint: Checkpoint,
    pictures: Annotated[list[Path] | None, typer.Argument(help="Two pictures; none with --seeds.")] = None,
    n: Annotated[int, typer.Option("-n", "--number", help="Pictures of the way, both ends included.")] = 8,
    depth: Annotated[float | None, typer.Option(help="How far towards noise: in (0, 1]. Default: 1.")] = None,
    via: Annotated[str | None, typer.Option(help="inversion (the ends are the pictures) or noise.")] = None,
    iterations: Iterations = None,
    seeds: Annotated[tuple[int, int] | None, typer.Option(help="Between the samples of two seeds.")] = None,
    *,
    options: Options,
) -> None:
    """Draw the way from one picture to another, through noise."""
    from inkdrop.edit_jobs import Desk

    given = {"depth": depth, "via": via, "iterations": iterations}
    desk = Desk("interpolate" if seeds is None else "interpolate_seeds", checkpoint, options)
    after = desk.way(pictures or [], seeds, n, {name: value for name, value in given.items() if value is not None})
    typer.echo(desk.write(after, inputs=pictures or []))


@edit.command()
@with_options
def vary(
    checkpoint: Checkpoint,
    pictures: Pictures,
    n: Annotated[int, typer.Option("-n", "--number", help="Variations of each.")] = 8,
    strength: Annotated[float, typer.Option(help="How much is drawn anew: in (0, 1].")] = 0.5,
    eta: Annotated[
        float | None, typer.Option(help="Invert, and decode with so much fresh noise, in (0, 1], instead.")
    ] = None,
    iterations: Iterations = None,
    *,
    options: Options,
) -> None:
    """Draw variations of pictures."""
    from inkdrop.edit_jobs import Desk

    desk = Desk("vary", checkpoint, options)
    images = desk.read(pictures)
    after = desk.run(images, count=n, strength=strength, eta=eta, iterations=iterations)
    typer.echo(desk.write(after, before=[images], inputs=pictures))


@edit.command()
@with_options
def restore(
    checkpoint: Checkpoint,
    pictures: Annotated[list[Path], typer.Argument(help="What was measured: small, blurred, grey ... pictures.")],
    operator: Annotated[str, typer.Option(help="superresolve, blur, gray, mask; see: inkdrop list operators.")],
    method: Annotated[str, typer.Option(help="ddnm (replacement) or pigdm (gradient).")] = "ddnm",
    noise_std: Annotated[float, typer.Option(help="Standard deviation of the measurements' noise, of [-1, 1].")] = 0.0,
    sd: Annotated[float | None, typer.Option(help="Standard deviation of the data. Default: 0.5.")] = None,
    scale: Annotated[float | None, typer.Option(help="Strength of pigdm. Default: 1.")] = None,
    simulate: Annotated[
        bool, typer.Option("--simulate", help="The pictures are whole: measure them first, to see how well it does.")
    ] = False,
    *,
    options: Options,
) -> None:
    """Enlarge, deblur, colourise or fill in pictures that a linear operator measured.

    The operator's knobs: --set operator.factor=4.
    """
    from inkdrop.edit_jobs import Desk

    desk = Desk("restore", checkpoint, options)
    made, whole, measured = desk.measure(pictures, operator, noise_std, simulate)
    after = desk.run(measured, made, method=method, noise_std=noise_std, sd=sd, scale=scale)
    if whole:
        desk.compare(after, whole[0], "restored")
    typer.echo(desk.write(after, before=[*whole, made.inverse(measured)], inputs=pictures))
