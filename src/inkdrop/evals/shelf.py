"""Shelf: tensors kept on disk by all that they depend on, so that work that was stopped goes on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from inkdrop.core.dataset import Data
from inkdrop.data.fetch import cache_folder
from inkdrop.errors import BadArgument
from inkdrop.evals.features import Features
from inkdrop.evals.nearest import Near, nearest
from inkdrop.files import remove_folder, tensors, write_folder

__all__ = ["Make", "Seen", "Shelf", "kept", "look", "setting"]

Make = Callable[[], Mapping[str, Tensor]]
"""Makes what is to be kept: tensors by name."""

_FILE, _ABOUT = "tensors.safetensors", "about"


class Seen(NamedTuple):
    """Images that were looked at: all that figures about them are made of.

    Attributes:
        features: float32 (B, D).
        near: the nearest training images.
    """

    features: Tensor
    near: Near


def look(x: Tensor, train: Data, features: Features) -> Seen:
    """What figures are made of, of images x (B, C, *S) in [-1, 1]: their features and their nearest training images."""
    return Seen(features(x), nearest(x, train))


@lru_cache(maxsize=1)
def _own_code() -> str:
    """A hash of all code of the package: what was made by other code is made again."""
    total = hashlib.sha256()
    root = Path(__file__).parents[1]
    for file in sorted(root.rglob("*.py")):
        total.update(file.relative_to(root).as_posix().encode() + b"\0" + file.read_bytes())
    return total.hexdigest()[:16]


def setting() -> dict[str, Any]:
    """What else than arguments decides the last bits of a computation: versions, code, threads."""
    return {
        "torch": str(torch.__version__),
        "code": _own_code(),
        "threads": torch.get_num_threads(),
    }


class Shelf:
    """A folder NAME/KEY in $INKDROP_CACHE or ~/.cache/inkdrop, KEY being a hash of all that its tensors depend on.

    An entry is written whole or not at all, so a process that is killed leaves those that it had finished, and the next
    one that asks for them goes on from there. An entry that cannot be read is made again.

    Args:
        name: the kind of things kept, a name for a folder.
        about: what they depend on besides `setting()`, as plain JSON.

    Raises:
        BadArgument: about holds a number that is not finite.
    """

    def __init__(self, name: str, about: Mapping[str, Any]) -> None:
        try:
            text = json.dumps({**about, "setting": setting()}, sort_keys=True, allow_nan=False)
        except ValueError as error:
            raise BadArgument(f"cache {name}: got what is no plain JSON ({error})") from None
        self.about: dict[str, Any] = json.loads(text)
        self.folder = cache_folder(name) / hashlib.sha256(text.encode()).hexdigest()[:16]

    def get(self, name: str, make: Make) -> dict[str, Tensor]:
        """What is kept by this name, made now if it is not there.

        Raises:
            BadArgument: it cannot be written, or is not finite.
        """
        if (found := self.find(name)) is not None:
            return found
        made = {key: tensor.contiguous() for key, tensor in make().items()}
        if (self.folder / name).exists():  # damaged
            remove_folder(self.folder / name)
        about = json.dumps(self.about, indent=1) + "\n"
        try:
            write_folder(
                self.folder / name,
                {_FILE: tensors(made), f"{_ABOUT}.json": lambda path: _write(path, about)},
            )
        except BadArgument:
            if self.find(name) is None:  # else another process was first
                raise
        return made

    def find(self, name: str) -> dict[str, Tensor] | None:
        """What is kept by this name, or None."""
        try:
            found: dict[str, Tensor] = load_file(self.folder / name / _FILE)
        except (OSError, SafetensorError):
            return None
        return found

    def drop(self, name: str) -> None:
        """Keep this no longer, if it is there."""
        if (self.folder / name).exists():
            remove_folder(self.folder / name)


def _write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")


def kept(shelf: Shelf | None, name: str, make: Make) -> dict[str, Tensor]:
    """What the shelf keeps by this name; without a shelf, what is made now."""
    return dict(make()) if shelf is None else shelf.get(name, make)
