"""Files: folders written whole or not at all and known by their hashes; safetensors and JSON, never pickles."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from inkdrop.errors import BadArgument, BadCheckpoint, InkdropError

__all__ = [
    "Writer",
    "load_weights",
    "own_sha256",
    "refuse_file",
    "refuse_folder",
    "remove_folder",
    "replace_folder",
    "sha256",
    "tensors",
    "weights_hash",
    "write_folder",
    "write_json",
]

Writer = Callable[[Path], None]
"""Writes the file at the path that it is given."""


def weights_hash(part: nn.Module) -> str:
    """A hash of all that a part has learned, by name."""
    total = hashlib.sha256()
    for name, tensor in sorted(part.state_dict().items()):
        total.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} ".encode())
        total.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return total.hexdigest()[:16]


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


def sha256(path: Path) -> str:
    """The hash of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def tensors(state: Mapping[str, Tensor]) -> Writer:
    """A writer of tensors as safetensors.

    Raises:
        BadArgument: one of them is not finite.
    """
    from safetensors.torch import save_file

    whole = {name: t.detach().cpu().contiguous() for name, t in state.items()}
    bad = [name for name, t in whole.items() if t.is_floating_point() and not bool(torch.isfinite(t).all())]
    if bad:
        raise BadArgument(f"save: {bad[0]} is not finite; nothing was saved")
    return lambda path: save_file(whole, path)


def own_sha256(record: Mapping[str, Any]) -> str:
    """The hash of a manifest's content, so that a byte that flipped in it is noticed too."""
    content = json.dumps({name: value for name, value in record.items() if name != "sha256"}, sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()


def write_json(path: Path, record: Any) -> None:
    """Write plain JSON; a number that is not finite is refused."""
    path.write_text(json.dumps(record, indent=1, allow_nan=False) + "\n", encoding="utf-8")


def load_weights(
    net: nn.Module, file: Path, placed: Callable[[Tensor, Tensor], Tensor] = lambda value, weight: value
) -> None:
    """Fill a net from a safetensors file, every key used and none left over.

    Args:
        net: to fill.
        file: of whole tensors.
        placed: (tensor of the file, the net's own) -> what is loaded of it.

    Raises:
        BadCheckpoint: the file cannot be read, or does not fit this net.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        own = net.state_dict()
        net.load_state_dict({name: placed(value, own.get(name, value)) for name, value in load_file(file).items()})
    except (SafetensorError, OSError, RuntimeError) as error:
        raise BadCheckpoint(f"{file}: does not fit this net ({str(error).splitlines()[-1].strip()})") from None


def refuse_file(path: Path) -> None:
    """Refuse a file that could not be written or replaced, before any work is done.

    Raises:
        BadArgument: it is a folder, or its folder cannot be made.
    """
    if path.is_dir():
        raise BadArgument(f"{path}: is a folder, need a file; choose another --out")
    base = next(place for place in path.absolute().parents if place.exists())
    if not (base.is_dir() and os.access(base, os.W_OK)):
        raise BadArgument(f"{path}: cannot be made, as {base} is no folder that can be written; choose another --out")


def refuse_folder(path: Path, overwrite: bool | None, record: str = "sample.json") -> None:
    """Refuse to write over something, before any work is done; only an older folder of the same kind may be replaced.

    Args:
        path: the folder to be written.
        overwrite: whether an older one may be replaced; None where the command has no --overwrite.
        record: the file by which one is known.

    Raises:
        BadArgument: it exists, or cannot be made.
    """
    if not path.exists():
        refuse_file(path)
    elif not overwrite:
        hint = "" if overwrite is None else ", or --overwrite"
        raise BadArgument(f"{path}: exists already; choose another --out{hint}")
    elif not (path / record).is_file():
        what = "samples" if record == "sample.json" else "edits"
        raise BadArgument(
            f"{path}: is not a folder of {what} (no {record}), so it is not overwritten; choose another --out"
        )


def replace_folder(path: Path, files: Mapping[str, Writer]) -> None:
    """Write a folder whole or not at all; an older one of its name goes only when the new one is there."""
    if not path.exists():
        return write_folder(path, files)
    old = path.with_name(f".{path.name}.{os.getpid()}.old")
    path.rename(old)
    try:
        write_folder(path, files)
    except BaseException:
        old.rename(path)
        raise
    return shutil.rmtree(old)
