"""What watches over the numbers and the memory of a run: losses that are not finite, and memory that runs out."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

from inkdrop.errors import Diverged

__all__ = ["Guard", "NotFinite", "offenders", "spoken"]

_NAMED = 3  # samples that a message names; the log has up to _FOUND
_FOUND = 16


class NotFinite(Diverged):
    """The loss or the gradient of an update is not finite; nothing was changed by it.

    Args:
        update: counted from 0.
        what: "loss" or "gradient".
        names: of the samples for which it is so by themselves; () if for none.
        batch: samples of the update.
        alone: whether single samples were looked at, so that () says something.
    """

    def __init__(self, update: int, what: str, names: Sequence[str], batch: int, *, alone: bool = True) -> None:
        self.update, self.what, self.names = update, what, tuple(names[:_FOUND])
        if len(names) == batch > 1:
            self.samples = f"each of the {batch} samples; lower train.lr, as the net has probably come apart"
        elif names:
            self.samples = f"{spoken(names)}; look at it, or take it out of the data"
        elif alone:
            self.samples = "the batch, though of no sample alone; lower train.lr"
        else:
            self.samples = "the batch (with train.shard samples cannot be looked at one by one); lower train.lr"
        super().__init__(f"training: the {what} of update {update} is not finite for {self.samples}")


def spoken(names: Sequence[str]) -> str:
    """Some names as a phrase: the first three, and how many more there are."""
    more = len(names) - _NAMED
    return ", ".join(names[:_NAMED]) + (f" and {more} more" if more > 0 else "")


@dataclass
class Guard:
    """How often a run was in trouble; a part of its state.

    Attributes:
        skipped: updates that were skipped, in all, also those that a return undid.
        streak: how many of them the newest updates are, without one in between that was not.
        rollbacks: how often the run went back to an earlier checkpoint.
        rate: the factor on the learning rate, halved by each of these, in (0, 1].
    """

    skipped: int = 0
    streak: int = 0
    rollbacks: int = 0
    rate: float = 1.0


def offenders(finite: Callable[[Sequence[int]], bool], places: Sequence[int]) -> list[int]:
    """The places whose gradient alone is not finite, 16 at most, by halving: log₂ B + 1 passes over a batch of B.

    Args:
        finite: whether the gradient of these places is.
        places: to look among, of which together it is not.
    """

    def search(part: Sequence[int]) -> Iterator[int]:
        if finite(part):
            return
        if len(part) == 1:
            yield part[0]
            return
        middle = len(part) // 2
        yield from search(part[:middle])
        yield from search(part[middle:])

    return list(islice(search(places), _FOUND))
