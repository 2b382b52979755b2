"""Snapshots: power-function averages kept while training, and an average of any length made of them afterwards."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from inkdrop.bundle import Bundle, load, locate
from inkdrop.errors import BadArgument, BadCheckpoint
from inkdrop.files import remove_folder, sha256, tensors, write_folder, write_json
from inkdrop.train.ema import LENGTHS, mixture
from inkdrop.train.shard import whole

if TYPE_CHECKING:
    from inkdrop.train.trainer import Trainer

__all__ = ["drop_later", "keep_snapshot", "reconstruct"]

_FORMAT, _FILE, _RECORD = "inkdrop-averages-1", "averages.safetensors", "averages.json"


def keep_snapshot(trainer: Trainer) -> None:
    """Write the averages of this update to averages/step-N of the run, if they are due and not there.

    Raises:
        BadArgument: a tensor is not finite, or it cannot be written.
    """
    path = trainer.out / "averages" / f"step-{trainer.update:08d}"
    if trainer.powers is None or trainer.update % trainer.recipe.train.snapshots:
        return
    if trainer.ranks.tell(path.exists()):
        return

    def record(target: Path) -> None:
        write_json(target, {"format": _FORMAT, "sha256": sha256(target.parent / _FILE)})

    held = whole(trainer.powers.state_dict(), trainer.ranks)
    trainer.ranks.lead(lambda: write_folder(path, {_FILE: tensors(held), _RECORD: record}))


def drop_later(run: Path, update: int) -> None:
    """Drop the snapshots of later updates, which a run that went back makes anew, and what a kill left half written."""
    for rest in (run / "averages").glob(".*.part"):
        shutil.rmtree(rest)
    for folder in (run / "averages").glob("step-*"):
        if folder.name > f"step-{update:08d}":
            remove_folder(folder)


def reconstruct(run: Path | str, length: float, *, trust: bool = False) -> Bundle:
    """The model of a run's newest checkpoint with the average of its weights that has this length.

    The average is the mixture of the checkpoint's own and the snapshots' whose profile is nearest to that of the
    length, in float64. The card says the length, and by how much of its norm the profile differs.

    Args:
        run: a run folder, or a checkpoint in it, up to which is averaged.
        length: the relative standard deviation of the profile, in (0, 0.28]; 0.1 averages the last third or so.
        trust: as in `load`.

    Raises:
        BadCheckpoint: the run kept no averages, or a snapshot is damaged.
        BadArgument: a length outside its range, or one that these snapshots cannot make to 5 % of its norm.

    Reference: Karras et al. 2024, section 3.2.
    """
    from safetensors.torch import load_file

    folder = locate(Path(run))
    bundle, state = load(folder, trust=trust), folder / "state.safetensors"
    held = load_file(state) if state.is_file() else {}
    own = {name.removeprefix("powers."): value for name, value in held.items() if name.startswith("powers.")}
    if not own:
        raise BadCheckpoint(f"{folder}: holds no power-function averages; train with --set train.snapshots=500")
    kept = [own, *(_read(path) for path in _earlier(folder))]
    ends = [(int(each["count"]), width) for each in kept for width in LENGTHS]
    factors, error = mixture(ends, (ends[0][0], length))
    if error > 0.05:
        raise BadArgument(
            f"ema length: got {length:g}, which {len(kept) - 1} snapshots make to {error:.0%} only; "
            "try one nearer to 0.05 or 0.1, or train with more snapshots"
        )
    with torch.no_grad():
        for name, parameter in bundle.denoiser.net.named_parameters():
            parts: list[Tensor] = [each[f"{width:.2f}/{name}"].double() for each in kept for width in LENGTHS]
            mixed = sum((part * factor for part, factor in zip(parts, factors, strict=True)), torch.zeros(()))
            parameter.copy_(mixed)
    bundle.card |= {"ema_length": length, "ema_error": round(error, 6)}
    return bundle


def _earlier(checkpoint: Path) -> list[Path]:
    """The snapshots before a checkpoint's update, oldest first."""
    found = sorted((checkpoint.parents[1] / "averages").glob("step-*"))
    return [path for path in found if path.name < checkpoint.name]


def _read(path: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    try:
        record = json.loads((path / _RECORD).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise BadCheckpoint(f"{path}: cannot be read ({error}); delete it to go without") from None
    if record.get("format") != _FORMAT or not (path / _FILE).is_file() or record.get("sha256") != sha256(path / _FILE):
        raise BadCheckpoint(f"{path}: is damaged, or of another version; delete it to go without")
    return load_file(path / _FILE)
