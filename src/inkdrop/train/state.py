"""The state of a run: what a checkpoint holds beside the model, so that a resumed run is the unbroken one."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from inkdrop.bundle import checkpoints, read_manifest, save
from inkdrop.core.dataset import Forward
from inkdrop.errors import BadCheckpoint, InkdropWarning
from inkdrop.files import load_weights, remove_folder
from inkdrop.settings import Train
from inkdrop.train.guard import Guard
from inkdrop.train.loss_scale import LossScale
from inkdrop.train.shard import own, placed, whole

if TYPE_CHECKING:
    from inkdrop.train.trainer import Trainer

__all__ = ["finite", "load_state", "moments", "newest_good", "parted", "prune", "save_state"]


def finite(trainer: Trainer) -> bool:
    """Whether all that a checkpoint would hold is finite: weights, average and the optimiser's moments."""
    held: list[Tensor] = [*trainer.denoiser.net.state_dict().values(), *trainer.ema.net.state_dict().values()]
    held += [value for entry in trainer.optimiser.state_dict()["state"].values() for value in entry.values()]
    fine = all(bool(torch.isfinite(own(value)).all()) for value in held if value.is_floating_point())
    return not trainer.ranks.most(int(not fine))


def moments(optimiser: torch.optim.Optimizer) -> dict[str, Tensor]:
    """What an optimiser remembers of each weight, as INDEX.NAME."""
    state = optimiser.state_dict()["state"]
    return {f"{index}.{name}": value for index, entry in state.items() for name, value in entry.items()}


def parted(held: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Tensors by what their names begin with, up to the first point."""
    parts: dict[str, dict[str, Tensor]] = {}
    for key, value in held.items():
        first, _, rest = key.partition(".")
        parts.setdefault(first, {})[rest] = value
    return parts


def save_state(trainer: Trainer, path: Path) -> None:
    """Write a checkpoint of everything, whole or not at all; rank 0 does, and all ranks hear of a failure.

    Raises:
        BadArgument: a tensor is not finite, or it cannot be written.
    """
    tensors = moments(trainer.optimiser)
    tensors |= {f"draws.{name}": value for name, value in trainer.draws.state_dict().items()}
    if trainer.powers is not None:
        tensors |= {f"powers.{name}": value for name, value in trainer.powers.state_dict().items()}
    progress = {
        "update": trainer.update,
        "seconds": trainer.seconds,
        "looked": trainer.looked,
        "accumulate": trainer.accumulate,
        "guard": asdict(trainer.guard),
        "loss_scale": None if trainer.scale is None else asdict(trainer.scale),
        "history": trainer.history,
        "stream": _stream(trainer),
    }
    held = (trainer.ema.net.state_dict(), trainer.denoiser.net.state_dict(), tensors)
    net, raw, state = (whole(part, trainer.ranks) for part in held)
    trainer.ranks.lead(lambda: save(trainer.bundle(), path, net=net, raw=raw, state=state, progress=progress))


def _stream(trainer: Trainer) -> Any:
    """Where a stream stands, of which each rank has read its part; None of other data."""
    states = trainer.ranks.gather(trainer.ahead.state(trainer.update))
    return trainer.data.merged(states) if isinstance(trainer.data, Forward) else None


def load_state(trainer: Trainer, folder: Path) -> None:
    """Take up the weights, average, optimiser and progress of a checkpoint.

    Raises:
        BadCheckpoint: it was not made for resuming, or does not fit.
    """
    from safetensors.torch import load_file

    record = read_manifest(folder)
    if not {"raw.safetensors", "state.safetensors", "state.json"} <= set(record["files"]):
        raise BadCheckpoint(
            f"{folder}: has no training state (raw.safetensors, state.*); it can be sampled, not resumed"
        )
    load_weights(trainer.denoiser.net, folder / "raw.safetensors", placed)
    load_weights(trainer.ema.net, folder / "net.safetensors", placed)
    held = parted(load_file(folder / "state.safetensors"))
    trainer.draws.load_state_dict(held.pop("draws", {}))
    powers, weights = held.pop("powers", {}), list(trainer.denoiser.net.parameters())
    if trainer.powers is not None:
        trainer.powers.load_state_dict(powers)
    state = {
        int(index): {name: placed(value, weights[int(index)]) for name, value in entry.items()}
        for index, entry in held.items()
    }
    groups = trainer.optimiser.state_dict()["param_groups"]
    trainer.optimiser.load_state_dict({"state": state, "param_groups": groups})
    for weight, entry in trainer.optimiser.state.items():  # the fused kernel takes moments in the layout of the weight
        for name, value in entry.items():
            if value.shape == weight.shape:
                entry[name] = torch.empty_like(weight).copy_(value)
    progress = _progress(folder)
    trainer.update, trainer.seconds = int(progress["update"]), float(progress["seconds"])
    trainer.looked = int(progress.get("looked", trainer.update))
    if trainer.recipe.train.accumulate == (known := record["recipe"]["train"]["accumulate"]):  # else it is a new wish
        trainer.accumulate = min(trainer.recipe.train.batch, progress.get("accumulate", known))
    trainer.guard, history = Guard(**progress.get("guard", {})), progress.get("history", [])
    trainer.history = [look for look in history if not look["update"] or trainer.looks_at(look["update"])]
    if trainer.scale is not None and progress.get("loss_scale") is not None:
        trainer.scale = LossScale(**progress["loss_scale"])
    if record["card"].get("fingerprint") != trainer.data.fingerprint:
        text = f"{folder}: the data have changed since; the run goes on, but not as if it had never stopped"
        warnings.warn(text, InkdropWarning, stacklevel=3)
    elif isinstance(trainer.data, Forward) and progress.get("stream") is not None:
        trainer.data.restore(progress["stream"])


def _progress(folder: Path) -> dict[str, Any]:
    progress: dict[str, Any] = json.loads((folder / "state.json").read_text(encoding="utf-8"))
    return progress


def newest_good(run: Path, train: Train) -> Path | None:
    """The checkpoint to go back to: the newest that was due, and not written after an update that was skipped.

    One that was written because the run stopped is none: an unbroken run would not have it. None if there is none.
    """
    for folder in reversed(checkpoints(run)):
        if (folder / "state.json").is_file():
            progress = _progress(folder)
            if progress["update"] % train.save_every == 0 and not progress.get("guard", {}).get("streak", 0):
                return folder
    return None


def prune(run: Path, train: Train) -> None:
    """Drop the oldest checkpoints beyond train.keep, but never the one to go back to."""
    spare = newest_good(run, train)
    for old in checkpoints(run)[: -train.keep]:
        if old != spare:
            remove_folder(old)
