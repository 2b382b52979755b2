"""Halfway: where a small training stands, kept beside what it will write, so that the same call goes on with it."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from inkdrop.errors import BadArgument, Diverged
from inkdrop.train.interrupt import heed_terminate, hold_interrupts
from inkdrop.train.record import write_atomically
from inkdrop.train.state import moments, parted

__all__ = ["Halfway"]

Part: TypeAlias = nn.Module | torch.optim.Optimizer

EVERY = 60.0
"""Seconds between two saves."""


class Halfway:
    """A training of an autoencoder or a classifier: what it has learned so far, in a hidden folder, OUT's neighbour.

    It is saved once a minute, when Ctrl-C or SIGTERM ends the training, and at the end. All that an update draws must
    depend on its number alone: then a training that goes on is, bit for bit, one that never stopped.

    Args:
        out: the folder that will be written; None keeps nothing.
        about: all that the training depends on, as plain JSON.

    Attributes:
        seconds: that earlier calls have spent.

    Raises:
        BadArgument: (by `running`) what is kept there is of another training, or cannot be read.
    """

    def __init__(self, out: Path | str | None, about: Mapping[str, Any]) -> None:
        self.folder = None if out is None else Path(out).with_name(f".{Path(out).name}.halfway")
        self.seconds = 0.0
        self._about = json.loads(json.dumps(about))
        self._parts: dict[str, Part] = {}
        self._done = 0
        self._began = self._saved = time.monotonic()

    @contextmanager
    def running(self, **parts: Part | None) -> Iterator[int]:
        """Fill the parts with what was kept, and give the number of updates that are done."""
        self._parts = {name: part for name, part in parts.items() if part is not None}
        if self.folder is not None and self.folder.exists():
            self._load(self.folder)
        with heed_terminate():
            try:
                yield self._done
            except KeyboardInterrupt:
                with hold_interrupts():
                    self._save()
                raise
            except Diverged:  # it would do so again
                self.drop()
                raise
            with hold_interrupts():
                self._save()

    @contextmanager
    def update(self, number: int) -> Iterator[None]:
        """What changes the parts in the update of this number, which no signal tears."""
        with hold_interrupts():
            yield
            self._done = number + 1
            if time.monotonic() - self._saved >= EVERY:
                self._save()

    def drop(self) -> None:
        """Forget what was kept."""
        if self.folder is not None:
            shutil.rmtree(self.folder, ignore_errors=True)

    def _save(self) -> None:
        """Write tensors beside the older ones, then the record that names them: whenever it ends, one pair is whole."""
        from safetensors.torch import save

        if self.folder is None or not self._done:
            return
        held = {f"{name}/{key}": value for name, part in self._parts.items() for key, value in _held(part).items()}
        spent, file = self.seconds + time.monotonic() - self._began, f"state-{self._done:08d}.safetensors"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise BadArgument(f"{self.folder}: cannot be made ({error.strerror}); choose another --out") from None
        write_atomically(self.folder / file, save({name: value.cpu().contiguous() for name, value in held.items()}))
        record = {"about": self._about, "done": self._done, "seconds": spent}
        write_atomically(self.folder / "state.json", record)
        for old in self.folder.iterdir():
            if old.name not in (file, "state.json"):
                old.unlink()
        self._saved = time.monotonic()

    def _load(self, folder: Path) -> None:
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        if not (folder / "state.json").exists():
            return  # killed in the first save
        try:
            record = json.loads((folder / "state.json").read_text(encoding="utf-8"))
            about, done, seconds = record["about"], int(record["done"]), float(record["seconds"])
            held = load_file(folder / f"state-{done:08d}.safetensors")
        except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
            why = str(error).splitlines()[0]
            raise BadArgument(f"{folder}: cannot be read ({why}); remove it to begin again") from None
        if about != self._about:
            raise BadArgument(f"{folder}: is half of another training; remove it, or choose another --out")
        for name, part in self._parts.items():
            own = {key.partition("/")[2]: value for key, value in held.items() if key.startswith(f"{name}/")}
            _fill(part, own)
        self._done, self.seconds = done, seconds


def _held(part: Part) -> dict[str, Tensor]:
    """What a part has learned, by name."""
    if isinstance(part, nn.Module):
        return dict(part.state_dict())
    return moments(part)


def _fill(part: Part, held: Mapping[str, Tensor]) -> None:
    if isinstance(part, nn.Module):
        part.load_state_dict(dict(held))
        return
    state = {int(index): entry for index, entry in parted(held).items()}
    part.load_state_dict({"state": state, "param_groups": part.state_dict()["param_groups"]})
