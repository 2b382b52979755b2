"""How long an update of each of several trainings takes on this machine, so that all can have as many as are fair."""

from __future__ import annotations

import fcntl
import json
import random
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from inkdrop.train.record import write_atomically


def paces(path: Path, makers: Mapping[str, Callable[[], Callable[[], object]]], rounds: int = 16) -> dict[str, float]:
    """Seconds of the processor that an update of each takes, measured once and kept; a second process waits.

    All take their turn in every round, in another order each. What else the machine does slows a stretch of turns, so
    that a pace is the median over rounds of its time over the round's median, times the median of these.

    Args:
        path: where the paces are kept, as JSON.
        makers: by name, what makes a training, which is called for an update.
        rounds: how many are counted, after two that warm up.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not path.exists():
            steps, turns = {name: make() for name, make in makers.items()}, []
            for turn in range(rounds + 2):
                taken = {}
                for name in random.Random(turn).sample(list(steps), len(steps)):
                    began = time.process_time()
                    steps[name]()
                    taken[name] = time.process_time() - began
                turns.append(taken)
            usual = [statistics.median(taken.values()) for taken in turns[2:]]
            pairs = list(zip(turns[2:], usual, strict=True))
            found = {name: statistics.median(taken[name] / of for taken, of in pairs) for name in steps}
            write_atomically(path, {name: share * statistics.median(usual) for name, share in found.items()})
    known: dict[str, float] = json.loads(path.read_text(encoding="utf-8"))
    return known
