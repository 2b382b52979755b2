"""What a run writes down about itself."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from inkdrop import __version__
from inkdrop.errors import BadArgument

__all__ = ["begin_record", "describe_run", "go_on_record", "note_progress", "write_atomically"]


def write_atomically(path: Path, content: Any) -> None:
    """Write text or bytes, or anything else as JSON, so that the file is either the old one or the new one, whole.

    Raises:
        BadArgument: it cannot be written (disk full, no permission).
    """
    if not isinstance(content, (str, bytes)):
        content = json.dumps(content, indent=1, allow_nan=False) + "\n"
    part = path.with_name(f".{path.name}.part")
    try:
        with part.open("wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    except OSError as error:
        part.unlink(missing_ok=True)
        raise BadArgument(
            f"{path}: cannot be written ({error.strerror}); free some space or choose another place"
        ) from None


def describe_run(seed: int) -> dict[str, Any]:
    """Versions, hardware, command and seed of this run: what one needs to repeat it."""
    packages = {name: metadata.version(name) for name in ("torch", "numpy", "safetensors", "pillow")}
    return {
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
        "seed": seed,
        "versions": {"python": platform.python_version(), "inkdrop": __version__, **packages},
        "hardware": {
            "processor": _processor(),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "gpu": torch.cuda.get_device_name(0) if torch.cuda.is_available() else None,
        },
        "commit": _commit(),
    }


def begin_record(path: Path, seed: int) -> None:
    """Write the run.json of a new run: `describe_run`, when it began, its updates and hours (none yet)."""
    write_atomically(path, {**describe_run(seed), "began": _now(), "updates": 0, "hours": 0.0, "resumed": []})


def go_on_record(path: Path, seed: int, update: int) -> None:
    """Note in run.json that the run goes on at an update: with which versions, on which machine, by which command."""
    if (known := _read(path)) is None:
        return begin_record(path, seed)
    again = {"update": update, "began": _now(), **describe_run(seed)}
    return write_atomically(path, {**known, "resumed": [*known.get("resumed", []), again]})


def note_progress(path: Path, update: int, seconds: float) -> None:
    """Note in run.json how far the run is; a folder without one is left so."""
    if (known := _read(path)) is not None:
        write_atomically(path, {**known, "updates": update, "hours": round(seconds / 3600, 5)})


def _read(path: Path) -> dict[str, Any] | None:
    """The content of a run.json; None if there is none that can be read."""
    try:
        known = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return known if isinstance(known, dict) else None


def _now() -> str:
    """The time in UTC, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def _processor() -> str:
    """The processor's name as the system gives it."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _commit() -> str | None:
    """The git commit of the working folder, if it is one."""
    try:
        done = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, timeout=5, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
