"""A warm process that forks the ranks of small jobs: torch is imported once, every rank is a process of its own.

    python tests/ranked.py       reads a job as a line of JSON, answers with one: the exit status of each rank

A job: "what" (fit or resume), "size", "folder", "train" (fields), "trouble", what goes wrong on one rank. What a rank
says on stderr is in FOLDER-RANK.err.
"""

from __future__ import annotations

import faulthandler
import json
import os
import signal
import socket
import sys
import traceback
from pathlib import Path
from typing import Any


def trouble(kind: str, rank: int) -> None:
    """Let something go wrong on this rank, by wrapping what the trainer calls."""
    import torch

    from inkdrop.errors import BadArgument, BadData
    from inkdrop.train import state
    from inkdrop.train.trainer import Trainer

    losses, save, whole, done = Trainer.losses, state.save, state.whole, list[int]()

    def wrong(self: Any, *args: Any, **rest: Any) -> Any:
        if self.ahead.places != self.ranks.share(self.recipe.train.batch):
            raise AssertionError("a rank makes more than its own places")
        if torch.is_grad_enabled() and self.update == 5 and rank == self.ranks.size - 1:
            first, _ = not done, done.append(1)
            if kind == "memory" and first:
                raise MemoryError
            if kind == "unreadable":
                raise BadData("points[3]: cannot be read")
            if kind == "crash":
                raise ZeroDivisionError
            if kind in ("terminate", "kill") and first:
                os.kill(os.getpid(), signal.SIGTERM if kind == "terminate" else signal.SIGKILL)
        terms = losses(self, *args, **rest)
        if kind == "nan" and torch.is_grad_enabled() and self.update == 5:
            [rows, *more] = args
            places = more[0] if more else range(len(rows))
            bad = torch.tensor([place == self.recipe.train.batch - 1 for place in places])
            terms["loss"] = torch.where(bad, terms["loss"] * float("nan"), terms["loss"])
        return terms

    def full(*args: Any, **rest: Any) -> Any:
        if kind == "save":
            raise BadArgument("checkpoint: cannot be written (No space left on device)")
        return save(*args, **rest)

    def gone(*args: Any) -> Any:
        if kind == "kill-saving" and rank:
            os.kill(os.getpid(), signal.SIGKILL)
        return whole(*args)

    Trainer.losses, state.save, state.whole = wrong, full, gone  # type: ignore[method-assign,assignment]


def rank(job: dict[str, Any]) -> int:
    """One rank, in a process of its own: its exit status."""
    faulthandler.enable()  # what a crash of torch itself was doing
    from inkdrop.errors import InkdropError, Lost
    from inkdrop.train.buckets import Buckets
    from inkdrop.train.interrupt import Stopped
    from inkdrop.train.loop import fit, resume
    from runs import points

    Buckets.__init__.__defaults__ = (200,)  # bytes: a few weights each, so that there are many
    trouble(job.get("trouble", "none"), int(os.environ["RANK"]))
    train, folder = job.get("train", {}), Path(job["folder"])
    try:
        if job["what"] == "fit":
            fit(points(**train), folder, max_steps=job.get("max_steps"))
        else:
            resume(folder, settings=[f"train.{name}={json.dumps(value)}" for name, value in train.items()])
    except (InkdropError, Lost) as error:
        if not getattr(error, "echo", False):
            print(f"inkdrop: {error}", file=sys.stderr, flush=True)
        return 2
    except Stopped:
        pass
    return 0


def forked(job: dict[str, Any], number: int, port: int) -> int:
    """The process id of a rank."""
    pid = os.fork()
    if pid:
        return pid
    names = {"RANK": number, "LOCAL_RANK": number, "WORLD_SIZE": job["size"], "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in names.items()}, MASTER_ADDR="127.0.0.1")
    os.environ["INKDROP_PATIENCE"] = "30"
    said = os.open(f"{job['folder']}-{number}.err", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(said, 2)
    status = 1
    try:
        status = rank(job)
    except BaseException:  # noqa: BLE001 (os._exit would hide it)
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(status)
    return 0


def main() -> None:
    import torch.distributed  # noqa: F401 (once for all)

    import inkdrop.train.loop  # noqa: F401

    print("ready", flush=True)
    for line in sys.stdin:
        job = json.loads(line)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        pids = [forked(job, number, port) for number in range(job["size"])]
        print(json.dumps([os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]), flush=True)


if __name__ == "__main__":
    main()
