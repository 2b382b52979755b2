"""What makes an update fast changes none of its numbers, or as little as is said."""

from __future__ import annotations

import resource
import sys

import pytest
import torch

from inkdrop.train.allocator import keeping_memory

LARGE = 64 * 2**20  # bytes: 16,384 pages, and beyond every threshold that glibc sets by itself


def faults() -> int:
    """Page faults of making and freeing a large tensor."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(LARGE, dtype=torch.uint8)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only glibc's allocator can be told")
def test_freed_memory_is_kept_for_the_next_update_and_given_back_at_the_end():
    pages = LARGE // resource.getpagesize()
    faults()
    assert faults() > 0.9 * pages, "by itself the C library gives large blocks back"
    with keeping_memory():
        faults()
        assert faults() < 0.1 * pages
    assert faults() > 0.9 * pages
