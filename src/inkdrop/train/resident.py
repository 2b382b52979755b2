"""How much a process grows by training, measured at two smaller batches in a process of its own."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from inkdrop.errors import BadArgument
from inkdrop.recipe import Recipe, dump, read
from inkdrop.train.allocator import keeping_memory
from inkdrop.train.trainer import Trainer

__all__ = ["process_memory"]

_LARGEST = 64  # samples of the larger of the two measured micro-batches


def process_memory(recipe: Recipe, *, trust: bool = False) -> int | None:
    """The bytes by which a process will grow by a run's updates on the processor, data, libraries and holes included.

    What torch allocates is only a part: kernels have memory of their own, and the C library leaves holes. So processes
    of their own make real updates with a quarter and with half of the micro-batch (at most 64), and the line through
    their greatest resident sizes is continued to the micro-batch of the recipe. Takes some seconds.

    Args:
        recipe: of the run.
        trust: allow code from outside inkdrop, which the recipe or its codec names.

    Returns:
        bytes; None where the system does not tell (it is no Linux).

    Raises:
        BadArgument: the other process failed.
    """
    if not Path("/proc/self/status").exists():
        return None
    micro = -(-recipe.train.batch // recipe.train.accumulate)
    large = max(1, min(_LARGEST, micro // 2))
    sizes = sorted({max(1, large // 2), large})
    grown = [_grown(recipe, size, trust=trust) for size in sizes]
    slope = (grown[-1] - grown[0]) / (sizes[-1] - sizes[0]) if len(sizes) > 1 else 0.0
    return int(grown[-1] + max(0.0, slope) * (micro - sizes[-1]))


def _grown(recipe: Recipe, size: int, *, trust: bool) -> int:
    """The growth of a process of its own by two updates with this micro-batch."""
    task = {"recipe": dump(recipe), "size": size, "threads": torch.get_num_threads(), "trust": trust}
    command = [sys.executable, "-c", "from inkdrop.train.resident import main; main()"]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    done = subprocess.run(command, input=json.dumps(task), capture_output=True, text=True, env=env)
    if done.returncode:
        raise BadArgument(f"memory: the process that measures it failed ({done.stderr.strip().splitlines()[-1]})")
    return int(done.stdout.splitlines()[-1])


def main() -> None:
    """What the other process does: the task on standard input, the growth in bytes on standard output."""
    task: dict[str, Any] = json.load(sys.stdin)
    torch.set_num_threads(task["threads"])
    recipe, before = read(task["recipe"]), _status("VmRSS")
    with keeping_memory():
        parts = min(2, recipe.train.accumulate)  # a second part finds the gradients of the first
        train = replace(recipe.train, batch=parts * task["size"], accumulate=parts)
        trainer = Trainer(replace(recipe, train=train), None, device="cpu", trust=task["trust"])
        for _ in range(2):
            trainer.step()
        grown = _status("VmHWM") - before
    sys.stdout.write(f"{grown}\n")


def _status(field: str) -> int:
    """A field of /proc/self/status, in bytes."""
    found = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text(encoding="ascii"))
    if found is None:
        raise BadArgument(f"memory: the system does not tell {field}")
    return 1024 * int(found[1])
