"""Bundle: what a checkpoint folder holds, written atomically and read back whole; safetensors and JSON, never pickles.

    step-00001000/
        bundle.json         recipe, shape, classes, card, the sha256 of every other file, and its own
        net.safetensors     the averaged (EMA) weights, which are what is sampled
        raw.safetensors     the optimiser's own weights
        state.*             what resuming needs besides (optional)

A folder under its final name is complete: it is written beside it under another name, flushed to disk, then renamed.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from inkdrop.core.schedule import Schedule
from inkdrop.denoiser import Denoiser
from inkdrop.errors import BadArgument, BadCheckpoint, InkdropError
from inkdrop.plan import Plan
from inkdrop.recipe import Recipe, denoiser_of, dump, read, refuse_foreign_code

__all__ = [
    "Bundle",
    "checkpoints",
    "load",
    "load_weights",
    "locate",
    "read_manifest",
    "remove_folder",
    "save",
    "write_folder",
]

MANIFEST = "bundle.json"
FORMAT = "inkdrop-bundle-1"

Writer = Callable[[Path], None]


@dataclass
class Bundle:
    """A trained model and all that is needed to sample it.

    Attributes:
        recipe: that made it.
        denoiser: with its weights.
        shape: (C, *S) of one sample.
        classes: class names, label i being classes[i]; () if there are none.
        levels: how many values a channel can take; None if continuous.
        card: what it was trained on, when, where and how far; for people.
        parts: what else answers questions, by the name in Ask.of ("weak", "classifier"); given by `with_parts`, and not
            saved with it.
    """

    recipe: Recipe
    denoiser: Denoiser
    shape: tuple[int, ...]
    classes: tuple[str, ...] = ()
    levels: int | None = None
    card: dict[str, Any] = field(default_factory=dict)
    parts: dict[str, nn.Module] = field(default_factory=dict)

    @property
    def plan(self) -> Plan:
        """How to sample it unless told otherwise."""
        return self.recipe.plan

    @property
    def guidable(self) -> bool:
        """Whether it was trained with dropped conditions, so that it has an unconditional branch."""
        return self.recipe.train.null_rate > 0

    @property
    def schedule(self) -> Schedule:
        """Its noise levels."""
        return self.denoiser.schedule


def write_folder(path: Path, writers: Mapping[str, Writer]) -> None:
    """Write a folder whole or not at all.

    Args:
        path: the final name; must not exist.
        writers: file name -> function that writes the file at the path it is given.

    Raises:
        BadArgument: the folder exists, or cannot be written (disk full, no permission); nothing is left behind.
    """
    if path.exists():
        raise BadArgument(f"{path}: exists already; choose another name")
    part = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.part")
    try:
        part.mkdir(parents=True)
        for name, write in writers.items():
            write(part / name)
            _flush(part / name)
        _flush(part)
        part.rename(path)
        _flush(path.parent)
    except InkdropError:
        shutil.rmtree(part, ignore_errors=True)
        raise
    except Exception as error:  # safetensors has its own error for a full disk
        shutil.rmtree(part, ignore_errors=True)
        raise BadArgument(
            f"{path}: cannot be written ({_reason(error)}); free some space or choose another place"
        ) from error
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise


def remove_folder(path: Path) -> None:
    """Delete a folder so that nothing is under its name at once, and a kill on the way leaves only a hidden rest."""
    part = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.part")
    path.rename(part)
    shutil.rmtree(part)


def _reason(error: Exception) -> str:
    return error.strerror or str(error) if isinstance(error, OSError) else str(error).splitlines()[0]


def _flush(path: Path) -> None:
    """Force a file or folder to disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _tensors(tensors: Mapping[str, Tensor]) -> Writer:
    from safetensors.torch import save_file

    whole = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
    bad = [name for name, t in whole.items() if t.is_floating_point() and not bool(torch.isfinite(t).all())]
    if bad:
        raise BadArgument(f"checkpoint: {bad[0]} is not finite; nothing was saved")
    return lambda path: save_file(whole, path)


def save(
    bundle: Bundle,
    path: Path,
    *,
    raw: Mapping[str, Tensor] | None = None,
    state: Mapping[str, Tensor] | None = None,
    progress: Mapping[str, Any] | None = None,
) -> None:
    """Write a checkpoint folder, atomically.

    Args:
        bundle: what to save.
        path: a new folder.
        raw: the optimiser's own weights, beside the averaged ones in bundle.denoiser.net.
        state: the optimiser's tensors, for resuming.
        progress: plain JSON for resuming (the update reached).

    Raises:
        BadArgument: a tensor is not finite, the folder exists or cannot be written.
    """
    files: dict[str, Writer] = {"net.safetensors": _tensors(bundle.denoiser.net.state_dict())}
    if raw is not None:
        files["raw.safetensors"] = _tensors(raw)
    if state is not None:
        files["state.safetensors"] = _tensors(state)
    if progress is not None:
        files["state.json"] = lambda p: _write_json(p, dict(progress))

    def manifest(target: Path) -> None:
        record = {
            "format": FORMAT,
            "recipe": dump(bundle.recipe),
            "shape": list(bundle.shape),
            "range": [-1.0, 1.0],
            "levels": bundle.levels,
            "classes": list(bundle.classes),
            "card": bundle.card,
            "files": {name: _sha256(target.parent / name) for name in files},
        }
        _write_json(target, {**record, "sha256": _own_sha256(record)})

    write_folder(path, {**files, MANIFEST: manifest})


def _own_sha256(record: Mapping[str, Any]) -> str:
    """The hash of a manifest's content, so that a byte that flipped in it is noticed too."""
    content = json.dumps({name: value for name, value in record.items() if name != "sha256"}, sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()


def _write_json(path: Path, record: Any) -> None:
    path.write_text(json.dumps(record, indent=1, allow_nan=False) + "\n", encoding="utf-8")


def checkpoints(run: Path) -> list[Path]:
    """The complete checkpoints of a run folder, oldest first."""
    return sorted(p for p in (run / "checkpoints").glob("step-*") if (p / MANIFEST).is_file())


def locate(path: Path) -> Path:
    """The checkpoint folder that a path means: itself, or the newest of a run.

    Raises:
        BadCheckpoint: there is none.
    """
    if (path / MANIFEST).is_file():
        return path
    if not path.is_dir():
        what = "is a file" if path.exists() else "no such folder"
        beside = [p.name for p in checkpoints(path.parent.parent)] if path.name.startswith("step-") else []
        there = f" (there are {', '.join(beside)})" if beside else ""
        raise BadCheckpoint(f"{path}: {what}; give a run folder or a checkpoint in it{there}")
    found = checkpoints(path)
    if not found and (path / "classifier.json").is_file():
        raise BadCheckpoint(f"{path}: is a classifier; give a run, and this with --classifier")
    if not found:
        raise BadCheckpoint(f"{path}: holds no checkpoint (no {MANIFEST}, no checkpoints/step-*); train first")
    return found[-1]


def read_manifest(folder: Path) -> dict[str, Any]:
    """The bundle.json of a checkpoint, with its files checked.

    Raises:
        BadCheckpoint: it is not JSON of this format, or a file is missing or does not have its sha256.
    """
    manifest = folder / MANIFEST
    try:
        record = json.loads(manifest.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise BadCheckpoint(f"{manifest}: cannot be read ({error}); {_ANOTHER}") from None
    if not isinstance(record, dict) or record.get("format") != FORMAT:
        raise BadCheckpoint(f"{manifest}: is not of the format {FORMAT}; give a checkpoint that inkdrop wrote")
    if record.get("sha256") != _own_sha256(record):
        raise BadCheckpoint(f"{manifest}: is corrupt (its sha256 is not the recorded one); {_ANOTHER}")
    try:
        _check_form(record)
    except InkdropError as error:
        raise BadCheckpoint(f"{manifest}: {error}") from None
    for name, want in record["files"].items():
        file = folder / Path(name).name
        if not file.is_file():
            raise BadCheckpoint(f"{file}: is missing; {_ANOTHER}, or copy the folder again")
        if _sha256(file) != want:
            raise BadCheckpoint(f"{file}: is corrupt (its sha256 is not the recorded one); {_ANOTHER}")
    result: dict[str, Any] = record
    return result


_ANOTHER = "use another checkpoint (if this one is deleted, its run goes on from the one before)"


def _check_form(record: dict[str, Any]) -> None:
    """Refuse a manifest whose fields are missing or of another form; fills in what its recipe left out."""
    missing = [key for key in ("recipe", "shape", "classes", "files") if key not in record]
    if missing:
        raise BadCheckpoint(f"lacks {', '.join(missing)}")
    record["recipe"] = dump(read(record["recipe"]))
    shape, classes, files = record["shape"], record["classes"], record["files"]
    sizes = isinstance(shape, list) and shape and all(isinstance(n, int) and n >= 1 for n in shape)
    if not sizes or math.prod(shape) > 2**31:
        raise BadCheckpoint(f"got shape {shape}, need positive sizes")
    if not isinstance(classes, list) or not all(isinstance(name, str) for name in classes):
        raise BadCheckpoint(f"got classes {classes!r}, need a list of names")
    if not isinstance(files, dict) or not isinstance(record.get("card", {}), dict):
        raise BadCheckpoint("files and card must be JSON objects")


def load(
    path: Path | str, *, weights: Literal["ema", "raw"] = "ema", trust: bool = False, device: str = "cpu"
) -> Bundle:
    """Read a checkpoint: a folder, or a run folder, whose newest is taken.

    Args:
        path: where it is.
        weights: "ema", the averaged weights, or "raw", the optimiser's own.
        trust: allow parts named "my.module:thing", whose import runs their code.
        device: where the net goes.

    Raises:
        BadCheckpoint: a file is missing, foreign or corrupt, or names code outside inkdrop without trust.
    """
    folder = locate(Path(path))
    record = read_manifest(folder)
    if not trust:
        refuse_foreign_code(record["recipe"], folder, BadCheckpoint)
    name = {"ema": "net.safetensors", "raw": "raw.safetensors"}.get(weights)
    if name is None:
        raise BadArgument(f"weights: got {weights!r}, need ema or raw")
    if name not in record["files"]:
        other = "raw" if weights == "ema" else "ema"
        raise BadCheckpoint(f"{folder}: has no {weights} weights ({name}); try --weights {other}")
    recipe, shape, classes = read(record["recipe"]), tuple(record["shape"]), tuple(record["classes"])
    try:
        denoiser = denoiser_of(recipe, shape, len(classes))
    except InkdropError as error:
        raise BadCheckpoint(f"{folder}: cannot be built here: {error}") from None
    load_weights(denoiser.net, folder / name)
    denoiser.to(device).eval()
    return Bundle(recipe, denoiser, shape, classes, record.get("levels"), record.get("card", {}))


def load_weights(net: nn.Module, file: Path) -> None:
    """Fill a net from a safetensors file, every key used and none left over.

    Raises:
        BadCheckpoint: the file cannot be read, or does not fit this net.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        net.load_state_dict(load_file(file))
    except (SafetensorError, OSError, RuntimeError) as error:
        raise BadCheckpoint(f"{file}: does not fit this net ({str(error).splitlines()[-1].strip()})") from None
