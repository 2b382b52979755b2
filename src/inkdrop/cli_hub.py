"""inkdrop hub: models read from diffusers' folders, and written as such."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from inkdrop.options import Checkpoint, Clip, GridName, Sampler, Steps, Trust, Weights

__all__ = ["hub"]

hub = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode=None,
    help="Exchange models with diffusers: folders of JSON and safetensors, never pickles.",
)


@hub.command()
def read(
    source: Annotated[str, typer.Argument(help="A pipeline's folder, or a hub id as google/ddpm-cifar10-32.")],
    out: Annotated[Path, typer.Option(help="Checkpoint to write; must be new.")],
    variant: Annotated[str | None, typer.Option(help="Which of several sets of weights, as fp16.")] = None,
    revision: Annotated[str | None, typer.Option(help="Of a hub id: a branch, a tag or a commit.")] = None,
    sampler: Sampler = None,
    grid: GridName = None,
    steps: Steps = None,
    clip: Clip = None,
) -> None:
    """Read a pipeline of diffusers as a checkpoint, which is sampled like one's own.

    By default it samples as its scheduler says; --sampler, --grid, --steps or --clip replace all of that. An
    AutoencoderKL alone becomes an autoencoder to train in: inkdrop train RECIPE --codec OUT.
    """
    from inkdrop.bundle import save
    from inkdrop.codec import Codec, save_codec
    from inkdrop.files import refuse_folder
    from inkdrop.find import find
    from inkdrop.generate import plan_of
    from inkdrop.hub.read import read_any
    from inkdrop.jobs import asks_of
    from inkdrop.plan import Plan, change

    refuse_folder(out, None)
    for room, name in (("samplers", sampler), ("grids", grid)):
        if name is not None:
            find(room, name)
    own = any(part is not None for part in (sampler, grid, steps, clip))
    plan = change(Plan(guide=()), sampler=sampler, grid=grid, steps=steps, clip=clip) if own else None
    found = read_any(source, variant=variant, plan=plan, revision=revision)
    if isinstance(found, Codec):
        save_codec(found, out)
        return typer.echo(f"autoencoder: {out}\nnext: inkdrop train RECIPE --codec {out}")
    plan_of(found, None, {})
    asks_of(found)  # runs the sampler on its grid once: what these refuse is refused before anything is written
    save(found, out)
    for note in found.card["hub"]["notes"]:
        typer.echo(f"note: {note}")
    told = ' --text "..."' if found.reader is not None else ""
    return typer.echo(f"checkpoint: {out}, a {found.card['hub']['pipeline']}\nnext: inkdrop sample {out}{told}")


@hub.command()
def write(
    checkpoint: Checkpoint,
    out: Annotated[Path, typer.Option(help="Folder to write; must be new.")],
    label: Annotated[
        str | None, typer.Option("--class", help="Of a U-Net of classes: the one to write, or none for its null.")
    ] = None,
    sampler: Annotated[str | None, typer.Option(help="ddpm, ddim or plms; the model's own by default.")] = None,
    grid: Annotated[str | None, typer.Option(help="trailing or leading; the model's own by default.")] = None,
    clip: Clip = None,
    forget_null: Annotated[
        bool, typer.Option("--forget-null", help="Leave out a learned null text; theirs is the empty text.")
    ] = False,
    weights: Weights = "ema",
    trust: Trust = False,
) -> None:
    """Write a model as a folder that diffusers' pipelines load and run.

    DDPMPipeline, DDIMPipeline, LDMPipeline, DiTPipeline or StableDiffusionPipeline, by what the model is.
    """
    from inkdrop.files import refuse_folder
    from inkdrop.hub.write import write as written
    from inkdrop.jobs import open_bundle
    from inkdrop.plan import change

    refuse_folder(out, None)
    bundle = open_bundle(checkpoint, weights, trust, "cpu")
    plan = change(bundle.plan, sampler=sampler, grid=grid, clip=clip)
    kind = written(bundle, out, plan=plan, label=label, forget_null=forget_null)
    typer.echo(f'folder: {out}\nnext: python -c "from diffusers import {kind}; {kind}.from_pretrained({str(out)!r})"')
