"""Ranks meet in a store that holds what ranks of earlier attempts have left there."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from itertools import permutations
from time import sleep

import pytest
from torch.distributed import HashStore, Store

from inkdrop.meeting import meet

PATIENCE = timedelta(seconds=20)


def attempt(store: Store, order: tuple[int, ...], address: str, pause: float = 0.05) -> set[str]:
    """What the ranks read of rank 0's address after they have met, when they come in this order."""

    def rank(number: int) -> bytes:
        sleep(pause * order.index(number))
        room = meet(store, number, len(order), PATIENCE)
        if number == 0:
            sleep(pause)  # a rank that read what was there before would read it now
            room.set("address", address)
        return room.get("address").decode()

    with ThreadPoolExecutor(len(order)) as pool:
        return {*pool.map(rank, range(len(order)))}


@pytest.mark.parametrize("order", list(permutations(range(3))))
def test_an_attempt_reads_nothing_of_the_one_before(order):
    store = HashStore()
    assert attempt(store, (0, 1, 2), "old") == {"old"}
    assert attempt(store, order, "new") == {"new"}


def test_an_attempt_that_nobody_came_to_is_left_behind():
    """Of the first only rank 0 came, of the second only rank 1; the third is whole."""
    store, short = HashStore(), timedelta(seconds=0.1)
    for rank in (0, 1):
        with pytest.raises(RuntimeError, match="not all of them came"):
            meet(store, rank, 2, short)
    assert attempt(store, (1, 0), "new") == {"new"}


def test_a_rank_alone_waits_for_nobody():
    meet(HashStore(), 0, 1, timedelta(0)).set("a", "b")
