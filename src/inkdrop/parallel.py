"""Parallel: the ranks of a job, how a batch is shared among them, and what they tell one another.

`torchrun` starts one process a rank and names each in its environment; the first question about ranks joins them. What
they tell one another is JSON and plain tensors, so that nothing is unpickled. One process alone joins nothing and
waits for nobody.
"""

from __future__ import annotations

import atexit
import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from itertools import pairwise
from typing import TYPE_CHECKING, Any, TypeVar

from inkdrop import errors
from inkdrop.errors import BadArgument, InkdropError, Lost
from inkdrop.meeting import meet

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["ALONE", "Ranks", "heeding_loss", "is_first", "is_many", "out_of_memory", "ranks", "shares"]

T = TypeVar("T")

PATIENCE = "INKDROP_PATIENCE"
"""The variable that says how many seconds a rank waits for the others; 1800 if it is not set."""


def is_many(env: Mapping[str, str] = os.environ) -> bool:
    """Whether this process is one of several that torchrun, or the like, started for one job."""
    return "RANK" in env and int(env.get("WORLD_SIZE", "1")) > 1


def is_first(env: Mapping[str, str] = os.environ) -> bool:
    """Whether this process is the one that speaks and writes: alone, or rank 0."""
    return not is_many(env) or env["RANK"] == "0"


def shares(places: range, parts: int) -> list[range]:
    """Places of a batch in parts that follow one another and differ by one place at most, the larger ones first.

    A rank's places are its share of the batch's, and a micro-batch's are its share of the rank's; what a sample draws
    depends on its place alone.

    Args:
        places: range(batch), or a share of it.
        parts: how many, ≥ 1; with more than there are places the last ones are empty.
    """
    size, rest = divmod(len(places), parts)
    ends = [places.start + i * size + min(i, rest) for i in range(parts + 1)]
    return [range(a, b) for a, b in pairwise(ends)]


@dataclass(frozen=True)
class Ranks:
    """The ranks of a job, as one of them sees them. All of them must call the same methods in the same order.

    Attributes:
        rank: this one's number, in [0, size).
        size: how many there are; 1 is a process alone, which none of the methods lets wait.
        local: its number on its machine, which is that of its GPU.
        restarts: how often torchrun has started this job anew.

    Raises:
        Lost: (by every method) another rank is gone, or was not heard of for INKDROP_PATIENCE seconds.
    """

    rank: int = 0
    size: int = 1
    local: int = 0
    restarts: int = 0

    @property
    def first(self) -> bool:
        """Whether this is rank 0, which alone writes and speaks."""
        return self.rank == 0

    def share(self, count: int) -> range:
        """This rank's places of `count`."""
        return shares(range(count), self.size)[self.rank]

    @contextmanager
    def _listening(self) -> Iterator[None]:
        """Say in words what it means that a collective fails."""
        try:
            yield
        except RuntimeError as error:
            raise _gone(error, self) from error

    def gather(self, facts: Any) -> list[Any]:
        """What each rank says (plain JSON), in the order of the ranks, the same on all."""
        if self.size == 1:
            return [facts]
        import torch

        content = torch.frombuffer(bytearray(json.dumps(facts).encode()), dtype=torch.uint8)
        return [json.loads(bytes(each.tolist())) for each in self._parts(content)]

    def cat(self, x: Tensor) -> Tensor:
        """The rows of all ranks, (b, ...) each and of any b, one after the other on the CPU: (B, ...)."""
        if self.size == 1:
            return x
        import torch

        return torch.cat(self._parts(x.detach().cpu().contiguous()))

    def _parts(self, x: Tensor) -> list[Tensor]:
        """The tensors of all ranks, which differ in their first size alone."""
        import torch
        import torch.distributed as dist

        with self._listening():
            sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(self.size)]
            dist.all_gather(sizes, torch.tensor([len(x)]))
            longest = max(int(size) for size in sizes)
            padded = torch.cat([x, x.new_zeros(longest - len(x), *x.shape[1:])])
            parts = [torch.empty_like(padded) for _ in range(self.size)]
            dist.all_gather(parts, padded)
        return [part[: int(size)] for part, size in zip(parts, sizes, strict=True)]

    def begin_sum(self, x: Tensor) -> Callable[[], None]:
        """Begin to make x the sum of all ranks' x, in place; the result waits until it is."""
        import torch.distributed as dist

        with self._listening():
            work = dist.all_reduce(x, async_op=True)

        def wait() -> None:
            with self._listening():
                work.wait()

        return wait

    def most(self, number: int) -> int:
        """The largest of the ranks' numbers."""
        if self.size == 1:
            return number
        import torch
        import torch.distributed as dist

        held = torch.tensor([number])
        with self._listening():
            dist.all_reduce(held, dist.ReduceOp.MAX)
        return int(held)

    def tell(self, facts: Any) -> Any:
        """What rank 0 says (plain JSON), on all ranks; what the others hand in is not looked at."""
        return self.gather(facts if self.first else None)[0]

    def agree(self, error: Exception | None) -> None:
        """Go on if no rank has an error; else raise that of the lowest rank that has one, on all.

        Raises:
            InkdropError: of the same kind on all ranks; on all but rank 0 its `echo` is set, as rank 0 says it for all.
            MemoryError: a rank is out of memory; on itself the error is its own.
            RuntimeError: anything else.
        """
        if self.size == 1:
            if error is not None:
                raise error
            return
        told = self.gather(None if error is None else _told(error))
        at = next((rank for rank, said in enumerate(told) if said is not None), None)
        if at is None:
            return
        if at != self.rank or error is None or isinstance(error, OSError):
            name, text = told[at]
            error = _made(name, text, at)
        if isinstance(error, InkdropError):
            error.echo = not self.first
        raise error

    def together(self, work: Callable[[], T]) -> T:
        """The result of work that each rank does by itself; if it fails on one, it has failed on all.

        Args:
            work: calls no method of these ranks.
        """
        return self._shared(work)  # type: ignore[return-value] # every rank works

    def lead(self, work: Callable[[], T]) -> T | None:
        """Let rank 0 alone work while the others wait: its result there and None elsewhere; a failure is all ranks'."""
        return self._shared(work if self.first else None)

    def _shared(self, work: Callable[[], T] | None) -> T | None:
        result, failed = None, None
        try:
            result = None if work is None else work()
        except (InkdropError, OSError, MemoryError, RuntimeError) as error:
            if self.size == 1:
                raise
            failed = error
        self.agree(failed)
        return result


ALONE = Ranks()
"""A process that is no part of a job."""


def ranks() -> Ranks:
    """The ranks of this process's job, joined at the first call; `ALONE` but for `restarts` if there is one process.

    A process group that the program has made itself is taken as it is.

    Raises:
        Lost: the others were not heard of.
        BadArgument: there is no torch.distributed here.
    """
    import torch.distributed as dist

    restarts = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
    if not dist.is_available():
        if is_many():
            raise BadArgument("ranks: this torch has no torch.distributed; start one process, or install another torch")
        return ALONE
    if not dist.is_initialized():
        if not is_many():
            return Ranks(restarts=restarts)
        _join()
    rank = dist.get_rank()
    return Ranks(rank, dist.get_world_size(), int(os.environ.get("LOCAL_RANK", rank)), restarts)


def _join() -> None:
    """Make the process group that the environment describes: gloo for the CPU, NCCL for GPUs."""
    import torch
    import torch.distributed as dist

    gpus = torch.cuda.is_available() and dist.is_nccl_available()
    try:
        patience = timedelta(seconds=float(os.environ.get(PATIENCE, "1800")))
        store, rank, size = next(dist.rendezvous("env://", timeout=patience))  # type: ignore[attr-defined]
        words = {"store": meet(store, rank, size, patience), "rank": rank, "world_size": size, "timeout": patience}
        dist.init_process_group("cpu:gloo,cuda:nccl" if gpus else "gloo", **words)
    except (ValueError, RuntimeError) as error:
        raise Lost(
            f"rank {os.environ['RANK']}: the ranks did not find one another ({str(error).splitlines()[0][:120]}); "
            "start them all with torchrun, and look whether MASTER_ADDR and MASTER_PORT can be reached"
        ) from error
    atexit.register(_leave)


def _leave() -> None:
    import torch.distributed as dist

    if dist.is_initialized():
        dist.destroy_process_group()


@contextmanager
def heeding_loss(ranks: Ranks) -> Iterator[None]:
    """Say in words what it means that a collective within torch fails: those of weights in shares (FSDP's).

    Raises:
        Lost: that was so; any other error is raised as it is.
    """
    try:
        yield
    except RuntimeError as error:
        signs = ("gloo", "NCCL", "ProcessGroup", "Connection closed by peer", "Timed out waiting")
        if isinstance(error, Lost) or not any(sign in str(error) for sign in signs):
            raise
        raise _gone(error, ranks) from error


def _gone(error: BaseException, ranks: Ranks) -> Lost:
    return Lost(
        f"rank {ranks.rank} of {ranks.size}: another rank is gone or does not answer "
        f"({str(error).splitlines()[0][:120]}); the run goes on from its newest checkpoint, by itself under "
        "torchrun --max-restarts, else with: inkdrop resume"
    )


def out_of_memory(error: BaseException) -> bool:
    """Whether an error is that of memory which cannot be had, on the processor or on a GPU."""
    import torch

    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and "can't allocate memory" in str(error)


def _told(error: Exception) -> tuple[str, str]:
    """An error in words that another rank can make one of: the name of its kind, and its text."""
    if isinstance(error, OSError):
        kind = "BadData" if isinstance(error, FileNotFoundError) else "BadArgument"
        return kind, f"{error.filename or 'file'}: {error.strerror or error}"
    house = (kind.__name__ for kind in type(error).__mro__ if kind.__name__ in errors.__all__)
    return next(house, "MemoryError" if out_of_memory(error) else "RuntimeError"), str(error)


def _made(name: str, text: str, rank: int) -> Exception:
    """The error of another rank, here."""
    kinds: dict[str, type[Exception]] = {"MemoryError": MemoryError, "RuntimeError": RuntimeError}
    kind = kinds.get(name) or getattr(errors, name)
    made: Exception = kind.__new__(kind, f"rank {rank}: {text}" if rank else text)
    return made
