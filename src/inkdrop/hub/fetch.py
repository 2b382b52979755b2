"""Fetch: a pipeline's folder, from this machine or, by its hub id, from the Hugging Face hub."""

from __future__ import annotations

import re
from pathlib import Path

from inkdrop.errors import BadArgument, BadCheckpoint, MissingExtra
from inkdrop.hub.folder import STEM

__all__ = ["COMPONENTS", "located", "patterns"]

COMPONENTS = {
    "unet": STEM,
    "transformer": STEM,
    "vae": STEM,
    "vqvae": STEM,
    "text_encoder": "model",
}
"""The folders of a pipeline that hold weights that are read, and what the files are called before their endings."""

_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}")


def located(source: str | Path, *, variant: str | None = None, revision: str | None = None) -> Path:
    """The folder that a path or a hub id means; an id is downloaded unless it is there already.

    Args:
        source: a folder, or "owner/name".
        variant: which of several sets of weights, as "fp16"; of a download only those are fetched.
        revision: of a hub id: a branch, a tag or a commit; None for the newest.

    Raises:
        BadCheckpoint: neither a folder nor a hub id, or the hub is out of reach or does not have it.
        BadArgument: a revision of a folder.
        MissingExtra: huggingface_hub is not installed.
    """
    folder = Path(source).expanduser()
    if folder.is_dir():
        if revision is not None:
            raise BadArgument(f"revision: got {revision!r} with a folder, need a hub id; leave it out")
        return folder
    if folder.exists():
        raise BadCheckpoint(f"{source}: is a file; give the folder of a pipeline, with its model_index.json")
    if not _ID.fullmatch(str(source)):
        raise BadCheckpoint(f"{source}: no such folder, and no hub id (owner/name); give one of them")
    return _downloaded(str(source), variant, revision)


def patterns(variant: str | None = None) -> list[str]:
    """What is fetched of a pipeline: JSON, safetensors of its components, and a tokenizer's text files; no pickle.

    The single files that hold a whole model once more, beside the folders, are left out, as is the safety checker.
    """
    middle = "" if variant is None else f".{variant}"
    whole = [f"{STEM}{middle}", *(f"{name}/{stem}{middle}" for name, stem in COMPONENTS.items())]
    weights = [f"{name}{end}" for name in whole for end in (".safetensors", "-*.safetensors")]
    return ["*.json", "tokenizer/*.txt", "tokenizer/*.model", *weights]


def _downloaded(name: str, variant: str | None, revision: str | None) -> Path:
    """The folder of a hub id in the hub's own cache."""
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError
    except ImportError:
        raise MissingExtra(f"hub id {name}", "huggingface_hub", "data") from None
    try:
        folder = Path(snapshot_download(name, revision=revision, allow_patterns=patterns(variant)))
    except (HfHubHTTPError, OSError, ValueError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
        raise BadCheckpoint(
            f"hub id {name}: cannot be had from here ({reason}); download the folder where the network allows "
            f"(hf download {name} --local-dir FOLDER), and give its path"
        ) from None
    if not any(folder.rglob("*.safetensors")):
        what = "safetensors" if variant is None else f"safetensors of the variant {variant!r}"
        raise BadCheckpoint(f"hub id {name}: has no {what}, and pickles are never read; save it anew as safetensors")
    return folder
