"""How much a process grows by training, and how long an update takes, measured at two smaller batches in its own."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from inkdrop.errors import BadArgument
from inkdrop.recipe import Recipe, dump, read
from inkdrop.train.allocator import keeping_memory
from inkdrop.train.trainer import Trainer

__all__ = ["Need", "need_of"]

_LARGEST = 64  # samples of the larger of the two measured micro-batches


class Need(NamedTuple):
    """What a run needs: bytes by which its process will grow, and the seconds of an update."""

    bytes: int
    seconds: float


def need_of(recipe: Recipe, *, trust: bool = False) -> Need | None:
    """What a run's updates need on the processor: memory with data, libraries and holes, and time.

    What torch allocates is only a part: kernels have memory of their own, and the C library leaves holes. So processes
    of their own make real updates with a quarter and with half of the micro-batch (at most 64), and the lines through
    their greatest resident sizes and through the times of a micro-batch are continued to that of the recipe. Takes
    about as long as three updates. The time is of updates alone, as busy as the machine is now.

    Args:
        recipe: of the run.
        trust: allow code from outside inkdrop, which the recipe or its codec names.

    Returns:
        bytes and seconds; None where the system does not tell (it is no Linux).

    Raises:
        BadArgument: the other process failed.
    """
    if not Path("/proc/self/status").exists():
        return None
    micro = -(-recipe.train.batch // recipe.train.accumulate)
    large = max(1, min(_LARGEST, micro // 2))
    sizes = sorted({max(1, large // 2), large})
    found = [_measured(recipe, size, trust=trust) for size in sizes]

    def continued(each: list[float]) -> float:
        slope = (each[-1] - each[0]) / (sizes[-1] - sizes[0]) if len(sizes) > 1 else 0.0
        return each[-1] + max(0.0, slope) * (micro - sizes[-1])

    grown, seconds = (continued(list(each)) for each in zip(*found, strict=True))
    return Need(int(grown), seconds * recipe.train.accumulate)


def _measured(recipe: Recipe, size: int, *, trust: bool) -> Need:
    """The growth of a process of its own by two updates with this micro-batch, and the seconds of one of these."""
    task = {"recipe": dump(recipe), "size": size, "threads": torch.get_num_threads(), "trust": trust}
    command = [sys.executable, "-c", "from inkdrop.train.resident import main; main()"]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    done = subprocess.run(command, input=json.dumps(task), capture_output=True, text=True, env=env)
    if done.returncode:
        raise BadArgument(f"memory: the process that measures it failed ({done.stderr.strip().splitlines()[-1]})")
    return Need(*json.loads(done.stdout.splitlines()[-1]))


def main() -> None:
    """What the other process does: the task on standard input, bytes and seconds on standard output."""
    task: dict[str, Any] = json.load(sys.stdin)
    torch.set_num_threads(task["threads"])
    recipe, before = read(task["recipe"]), _status("VmRSS")
    with keeping_memory():
        parts = min(2, recipe.train.accumulate)  # a second part finds the gradients of the first
        train = replace(recipe.train, batch=parts * task["size"], accumulate=parts)
        trainer = Trainer(replace(recipe, train=train), None, device="cpu", trust=task["trust"])
        trainer.step()  # the first is slower: kernels choose how they work
        began = time.perf_counter()
        trainer.step()
        seconds = (time.perf_counter() - began) / parts
        grown = _status("VmHWM") - before
    sys.stdout.write(f"{json.dumps([grown, seconds])}\n")


def _status(field: str) -> int:
    """A field of /proc/self/status, in bytes."""
    found = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text(encoding="ascii"))
    if found is None:
        raise BadArgument(f"memory: the system does not tell {field}")
    return 1024 * int(found[1])
