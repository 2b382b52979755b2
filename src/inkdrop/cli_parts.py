"""The commands that train a part of a model rather than the model: a classifier that guides it, its autoencoder."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal, cast

import typer

from inkdrop.options import Checkpoint, Device, Set, Trust

__all__ = ["make_ema", "train_autoencoder", "train_classifier"]


def train_classifier(
    checkpoint: Checkpoint,
    out: Annotated[Path, typer.Option(help="Folder to write; must be new.")],
    max_steps: Annotated[int, typer.Option(help="Updates.")] = 1500,
    width: Annotated[int, typer.Option(help="Channels of its first blocks.")] = 32,
    data: Annotated[Path | None, typer.Option(help="Where the data are, if they moved since training.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of weights, order and noise.")] = 0,
    trust: Trust = False,
    device: Device = "auto",
) -> None:
    """Train a classifier of a run's noisy images.

    It guides samples: inkdrop sample RUN --classifier OUT --set classifier.scale=2.
    """
    from inkdrop import jobs
    from inkdrop.files import refuse_folder
    from inkdrop.screen import Screen
    from inkdrop.train.classifier import fit_classifier
    from inkdrop.train.loop import choose

    recipe = choose(jobs.open_bundle(checkpoint, "ema", trust, "cpu").recipe, data=data)
    refuse_folder(out, None)
    with Screen("the same command goes on from here") as screen:
        heard = screen.task("training the classifier")
        made = fit_classifier(recipe, out, steps=max_steps, width=width, seed=seed, device=device, on_progress=heard)
    shares = ", ".join(f"{share:.1%}" for share in made.card["accuracy"])
    typer.echo(f"classifier: {out}, right on {shares} of held-out images, from clean to noise")


def train_autoencoder(
    name: Annotated[str, typer.Argument(metavar="DATA", help="A data set: folder, mnist, ... (inkdrop list data).")],
    out: Annotated[Path, typer.Option(help="Folder to write; must be new.")],
    data: Annotated[Path | None, typer.Option(help="Your data: a folder, a .zip, or IDX files.")] = None,
    max_steps: Annotated[int, typer.Option(help="Updates.")] = 3000,
    batch: Annotated[int, typer.Option(help="Images an update.")] = 16,
    precision: Annotated[str, typer.Option(help="float32, or bfloat16 where it is faster.")] = "float32",
    settings: Set = None,
    seed: Annotated[int, typer.Option(help="Seed of weights, order and noise.")] = 0,
    device: Device = "auto",
) -> None:
    """Train an autoencoder, for diffusion in its latents.

    Then: inkdrop train RECIPE --codec OUT. Knobs: data.*, net=NAME and net.* (inkdrop list codecs), against.*
    """
    from inkdrop import jobs
    from inkdrop.files import refuse_folder
    from inkdrop.screen import Screen
    from inkdrop.train.autoencoder import fit_autoencoder

    images, net, against = jobs.autoencoder_parts(name, data, settings or ())
    refuse_folder(out, None)
    with Screen("the same command goes on from here") as screen:
        heard = screen.task("training the autoencoder")
        made = fit_autoencoder(
            images,
            out,
            net=net,
            against=against,
            steps=max_steps,
            batch=batch,
            precision=cast(Literal["float32", "bfloat16"], precision),
            seed=seed,
            device=device,
            on_progress=heard,
        )
    shape, card = "×".join(map(str, made.latent_shape)), made.card
    quality = f"{card['psnr_db']:.1f} dB on held-out images, latents {shape} of deviation {card['latent_std']:.2f}"
    typer.echo(f"autoencoder: {out}, {quality}\nnext:        inkdrop train RECIPE --codec {out}")


def make_ema(
    checkpoint: Checkpoint,
    length: Annotated[float, typer.Option(help="Standard deviation of the average's profile over the run, as 0.08.")],
    out: Annotated[Path, typer.Option(help="Checkpoint folder to write; must be new.")],
    trust: Trust = False,
) -> None:
    """Average a run's weights anew, over another length, after training.

    For a run that kept snapshots: inkdrop train RECIPE --set train.snapshots=500.
    """
    from inkdrop.bundle import save
    from inkdrop.files import refuse_folder
    from inkdrop.train.snapshots import reconstruct

    refuse_folder(out, None)
    bundle = reconstruct(checkpoint, length, trust=trust)
    save(bundle, out)
    typer.echo(f"checkpoint: {out}, whose profile differs by {bundle.card['ema_error']:.2%} of its norm")
