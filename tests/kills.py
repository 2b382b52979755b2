"""A warm process that forks runs to be killed: torch is imported once, every run is a process of its own.

    python tests/kills.py        reads "fit FOLDER SHARED" or "resume FOLDER SHARED", answers with a process id;
                                 then reads a line and answers with the id and the exit status

A forked run writes what it is doing into SHARED, a file that it maps into memory: what a SIGKILL leaves there is what
the run was at. The trainer is watched from outside, by wrapping its methods; nothing of it is replaced.
"""

from __future__ import annotations

import mmap
import os
import struct
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

PHASES = ("start", "update", "save", "look", "log", "end")
FORM = struct.Struct("<qqq")  # the phase's number, updates done, the update of the newest save that returned


def recipe() -> Any:
    """What is trained: dropout is at work, an update is of two parts, a save comes every 4 updates."""
    from runs import points

    return points(dropout=0.3, steps=24, save_every=4, preview_every=8, keep=2, accumulate=2)


def read(shared: Path) -> tuple[str, int, int]:
    """The phase of a run, its updates, and its newest save, as it left them."""
    phase, done, saved = FORM.unpack(shared.read_bytes()[: FORM.size])
    return PHASES[phase], done, saved


def watch(shared: Path) -> None:
    """Let this process write down what it does."""
    from inkdrop.train import run as course
    from inkdrop.train.log import Log
    from inkdrop.train.trainer import Trainer

    with shared.open("r+b") as file:
        memory = mmap.mmap(file.fileno(), FORM.size)
    state = {"phase": 0, "done": 0, "saved": 0}

    def note(**changes: int) -> None:
        state.update(changes)
        memory[:] = FORM.pack(*state.values())

    def wrap(owner: Any, name: str, phase: str, after: Callable[[Any], dict[str, int]] = lambda thing: {}) -> None:
        whole = getattr(owner, name)

        def watched(self: Any, *args: Any, **rest: Any) -> Any:
            before = state["phase"]
            note(phase=PHASES.index(phase))
            found = whole(self, *args, **rest)
            note(phase=before, **after(self))
            return found

        setattr(owner, name, watched)

    wrap(Trainer, "gradient", "update")
    wrap(Trainer, "apply", "update", lambda trainer: {"done": trainer.update})
    wrap(Trainer, "save", "save", lambda trainer: {"saved": trainer.update})
    wrap(course.Run, "_look", "look")
    wrap(Log, "write", "log")


def child(what: str, folder: Path, shared: Path) -> None:
    """One run, in a process of its own."""
    from inkdrop.train.loop import fit, resume

    watch(shared)
    if what == "fit":
        fit(recipe(), folder)
    else:
        resume(folder)
    with shared.open("r+b") as file:
        _, done, saved = FORM.unpack(file.read(FORM.size))
        file.seek(0)
        file.write(FORM.pack(PHASES.index("end"), done, saved))


def warm_up() -> None:
    """Import all that a run needs, by doing what it does, but for a backward pass: after one, torch forbids forks."""
    from inkdrop import picture
    from inkdrop.train import loop
    from inkdrop.train.trainer import Trainer

    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(recipe(), Path(folder))
        trainer.held_out_loss()
        picture.save_grid(trainer.preview(), Path(folder) / "grid.png")
        trainer.load(trainer.save())
        loop.begin_record(Path(folder) / "run.json", 0)
        loop.choose(recipe(), settings=["train.seed=1"])


def serve() -> None:
    """Fork a run for each line, and tell its id; wait for it when the next line says so: until then the id is its."""
    import torch

    torch.set_num_threads(1)
    warm_up()
    print("ready", flush=True)
    while line := sys.stdin.readline():
        what, folder, shared = line.split()
        pid = os.fork()
        if not pid:
            status = 1
            try:
                child(what, Path(folder), Path(shared))
                status = 0
            finally:
                sys.stdout.flush()
                os._exit(status)
        print(pid, flush=True)
        sys.stdin.readline()
        print(pid, os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)


if __name__ == "__main__":
    serve()
