"""Meeting: where the ranks of a job find one another, though an earlier attempt of the job has met there too."""

from __future__ import annotations

import json
import secrets
import time
from datetime import timedelta
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch._C._distributed_c10d import Store

__all__ = ["meet"]

_PAUSE = 0.02


def meet(store: Store, rank: int, size: int, patience: timedelta) -> Store:
    """A view of the store that is the same on all ranks and that nobody has written to before.

    When torchrun starts a job anew, it hands out the store of the attempt before, in which the old ranks' addresses
    still lie: a rank that reads one of them before it is overwritten connects to a process that is dead. How often a
    job was started is not known alike on all machines, so it cannot tell attempts apart. So rank 0 draws a name for
    this attempt; every other rank answers under the name that it reads with a word of its own, and goes in when rank 0
    has let in that word, which no rank 0 of another attempt does.

    Args:
        store: that all ranks have in common.
        rank: this one's number, in [0, size).
        size: how many there are.
        patience: how long to wait for the others.

    Raises:
        RuntimeError: that time is over.
    """
    from torch.distributed import PrefixStore  # type: ignore[attr-defined]

    until = time.monotonic() + patience.total_seconds()
    if rank == 0:
        name = secrets.token_hex(8)
        store.set("inkdrop/attempt", name)
        words = [_wait(store, f"inkdrop/{name}/{other}", until) for other in range(1, size)]
        store.set(f"inkdrop/{name}/in", json.dumps(words))
    else:
        name = _enter(store, rank, until)
    return PrefixStore(f"inkdrop/{name}/store", store)


def _enter(store: Store, rank: int, until: float) -> str:
    """The name of the attempt into which rank 0 has let this rank."""
    word, answered = secrets.token_hex(8), ""
    while True:
        name = _wait(store, "inkdrop/attempt", until)
        if name != answered:
            store.set(f"inkdrop/{name}/{rank}", word)
            answered = name
        door = f"inkdrop/{name}/in"
        if store.check([door]) and word in json.loads(store.get(door)):
            return name
        _rest(until)


def _wait(store: Store, key: str, until: float) -> str:
    """What lies under a key, as soon as there is something."""
    while not store.check([key]):
        _rest(until)
    return store.get(key).decode()


def _rest(until: float) -> None:
    if time.monotonic() > until:
        raise RuntimeError("not all of them came")
    time.sleep(_PAUSE)
