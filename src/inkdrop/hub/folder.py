"""Folder: one component as diffusers and transformers keep it, config.json beside safetensors.

    unet/
        config.json
        diffusion_pytorch_model.safetensors                  or, of a variant, diffusion_pytorch_model.fp16.safetensors
        diffusion_pytorch_model.safetensors.index.json       or in shards, with an index of which file holds which key

Nothing here is ever unpickled: a .bin, .pt or .ckpt is refused, whatever else is in the folder.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from inkdrop.errors import BadArgument, BadCheckpoint
from inkdrop.files import Writer, write_folder
from inkdrop.hub.weights import Tensors

__all__ = ["STEM", "component_files", "read_component", "read_json", "read_tensors", "write_component"]

STEM = "diffusion_pytorch_model"
"""What diffusers calls the weights of a component; transformers says "model"."""

_MOST_JSON = 16 * 2**20
_MOST_SHARDS = 1000
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
_CONVERT = "save it there with save_pretrained(..., safe_serialization=True)"


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file of at most 16 MiB.

    Raises:
        BadCheckpoint: no such file, no JSON object, or NaN in it.
    """
    try:
        if path.stat().st_size > _MOST_JSON:
            raise BadCheckpoint(f"{path}: has {path.stat().st_size:,} bytes, need at most {_MOST_JSON:,} of JSON")
        text = path.read_text(encoding="utf-8")
        record = json.loads(text, parse_constant=_constant)
    except FileNotFoundError:
        raise BadCheckpoint(f"{path}: is missing; give a folder that diffusers wrote, downloaded whole") from None
    except (OSError, RecursionError, UnicodeDecodeError) as error:
        raise BadCheckpoint(f"{path}: cannot be read ({error}); download it again") from None
    except json.JSONDecodeError as error:
        why = _pointer(text) or f"is no JSON ({error}); download it again"
        raise BadCheckpoint(f"{path}: {why}") from None
    except ValueError as error:
        raise BadCheckpoint(f"{path}: {error}") from None
    if not isinstance(record, dict):
        raise BadCheckpoint(f"{path}: holds a {type(record).__name__}, need a JSON object")
    return record


def _constant(name: str) -> float:
    """An infinity, which is how diffusers writes that there is no bound (lambda_min_clipped)."""
    if name == "NaN":
        raise ValueError("holds NaN, need numbers")
    return float(name)


def _pointer(text: str) -> str | None:
    """What to say of a Git LFS pointer, which stands where the file itself should."""
    found = text.startswith("version https://git-lfs")
    return "is a Git LFS pointer, not the file; fetch it with: git lfs pull" if found else None


def read_tensors(
    folder: Path, *, stem: str = STEM, variant: str | None = None, dtype: torch.dtype | None = torch.float32
) -> dict[str, Tensor]:
    """The weights of a component, from one safetensors file or from shards.

    Args:
        folder: of the component.
        stem: what the files are called before their endings.
        variant: which of several sets of weights, as "fp16"; None for the plain one.
        dtype: what floating-point tensors become; None leaves them as they are stored.

    Raises:
        BadCheckpoint: there are none, only pickles, or a file is missing, foreign or not whole.
        BadArgument: variant is no plain word.
    """
    if variant is not None and not variant.replace("_", "").replace("-", "").isalnum():
        raise BadArgument(f"variant: got {variant!r}, need a plain word; try fp16")
    middle = "" if variant is None else f".{variant}"
    whole = folder / f"{stem}{middle}.safetensors"
    index = folder / f"{stem}.safetensors.index{middle}.json"
    if whole.is_file():
        return _read_file(whole, dtype)
    if index.is_file():
        return _read_shards(index, dtype)
    raise BadCheckpoint(_nothing(folder, stem, variant))


def _nothing(folder: Path, stem: str, variant: str | None) -> str:
    """Why a folder has no weights that can be read, and what to do."""
    if not folder.is_dir():
        return f"{folder}: no such folder; give a component's folder, with config.json and safetensors in it"
    wanted = f"{stem}.safetensors" if variant is None else f"{stem}.{variant}.safetensors"
    others = sorted({p.name[len(stem) + 1 :].split(".")[0] for p in folder.glob(f"{stem}.*.safetensors")})
    others += sorted(p.name.split(".")[-2] for p in folder.glob(f"{stem}.safetensors.index.*.json"))
    if others:
        return f"{folder}: has no {wanted}, but the variant {', '.join(others)}; try variant={others[0]!r}"
    if variant is not None and (
        (folder / f"{stem}.safetensors").is_file() or (folder / f"{stem}.safetensors.index.json").is_file()
    ):
        return f"{folder}: has no {wanted}, but the plain {stem}.safetensors; leave variant out"
    started = sorted(p.name for p in folder.glob("*.incomplete"))
    if started:
        return f"{folder}: the download of {started[0]} was not finished; download it again"
    pickles = sorted(p.name for pattern in _PICKLES for p in folder.glob(pattern))
    if pickles:
        return f"{folder}: has its weights as {pickles[0]} alone, a pickle, which is never read here; {_CONVERT}"
    return f"{folder}: has no {wanted}; download it again, whole, or if its weights are a .bin there, {_CONVERT}"


def _read_shards(index: Path, dtype: torch.dtype | None) -> dict[str, Tensor]:
    """The tensors of all files that an index names; every key where the index says, and no other."""
    places = read_json(index).get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(name, str) for name in places.values()):
        raise BadCheckpoint(f"{index}: has no weight_map from keys to files; download it again")
    files = sorted(set(places.values()))
    if len(files) > _MOST_SHARDS:
        raise BadCheckpoint(f"{index}: names {len(files):,} files, need at most {_MOST_SHARDS:,}")
    tensors: dict[str, Tensor] = {}
    for name in files:
        if Path(name).name != name or "\\" in name or not name.endswith(".safetensors"):
            raise BadCheckpoint(f"{index}: names {name!r}, need a .safetensors file of its own folder")
        if not (index.parent / name).is_file():
            raise BadCheckpoint(f"{index.parent / name}: is missing, a part of the weights; download it again")
        part = _read_file(index.parent / name, dtype)
        want = {key for key, file in places.items() if file == name}
        if part.keys() != want:
            odd = min(part.keys() ^ want)
            raise BadCheckpoint(
                f"{index.parent / name}: does not agree with its index about {odd}; download both again"
            )
        tensors |= part
    return tensors


def _read_file(path: Path, dtype: torch.dtype | None) -> dict[str, Tensor]:
    """The tensors of one safetensors file, one at a time, so that no second copy of all is held."""
    from safetensors import SafetensorError, safe_open

    try:
        with path.open("rb") as file:
            why = _pointer(file.read(64).decode("utf-8", "replace"))
        if why:
            raise BadCheckpoint(f"{path}: {why}")
        with safe_open(path, framework="pt") as file:
            return {key: _cast(file.get_tensor(key), dtype) for key in file.keys()}  # noqa: SIM118 (it is no dict)
    except (SafetensorError, OSError) as error:
        reason = str(error).splitlines()[0]
        raise BadCheckpoint(f"{path}: is not whole, or no safetensors ({reason}); download it again") from None


def _cast(value: Tensor, dtype: torch.dtype | None) -> Tensor:
    return value.to(dtype) if dtype is not None and value.is_floating_point() else value


def read_component(
    folder: Path | str, *, variant: str | None = None, dtype: torch.dtype | None = torch.float32
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """(config, tensors) of a component of diffusers.

    Args:
        folder: with config.json and safetensors.
        variant: as in `read_tensors`.
        dtype: what floating-point tensors become; None leaves them as they are stored.

    Raises:
        BadCheckpoint: as in `read_json` and `read_tensors`.
    """
    folder = Path(folder)
    return read_json(folder / "config.json"), read_tensors(folder, variant=variant, dtype=dtype)


def component_files(
    config: Mapping[str, Any], tensors: Tensors | None = None, *, under: str = "", name: str = "config.json"
) -> dict[str, Writer]:
    """File name -> its writer, for `bundle.write_folder`: a component, in a folder of its own or below one.

    Args:
        config: plain JSON.
        tensors: the weights; None for a component without.
        under: the folder's name within the one that is written; "" for itself.
        name: what the JSON is called.
    """
    from safetensors.torch import save_file

    before = f"{under}/" if under else ""
    text = json.dumps(dict(config), indent=2, sort_keys=True, allow_nan=False) + "\n"

    def write_config(path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")

    files: dict[str, Writer] = {f"{before}{name}": write_config}
    if tensors is not None:
        whole = {key: value.detach().cpu().contiguous() for key, value in tensors.items()}
        bad = [key for key, value in whole.items() if not bool(value.isfinite().all())]
        if bad:
            raise BadArgument(f"weights: {bad[0]} is not finite; nothing was written")
        files[f"{before}{STEM}.safetensors"] = lambda path: save_file(whole, path, metadata={"format": "pt"})
    return files


def write_component(folder: Path | str, config: Mapping[str, Any], tensors: Tensors) -> None:
    """Write a component as a new folder, whole or not at all.

    Raises:
        BadArgument: the folder exists or cannot be written, or a weight is not finite.
    """
    write_folder(Path(folder), component_files(config, tensors))
