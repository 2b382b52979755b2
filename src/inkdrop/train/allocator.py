"""The C library's memory allocator, told to keep what an update frees for the next one."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["keeping_memory"]

_TRIM_THRESHOLD, _TOP_PAD, _MMAP_MAX = -1, -2, -4  # glibc's malloc.h
_KEPT = ((_MMAP_MAX, 0), (_TRIM_THRESHOLD, -1), (_TOP_PAD, 64 * 2**20))
_USUAL = ((_MMAP_MAX, 65536), (_TRIM_THRESHOLD, 64 * 2**20), (_TOP_PAD, 128 * 2**10))


@contextmanager
def keeping_memory() -> Iterator[None]:
    """Keep the pages of freed tensors inside the process; what is free is given back at the end.

    By itself glibc asks the kernel for each large block and gives it back when it is freed, and every update pays for
    tens of thousands of page faults again. The numbers of a run do not change. Only with glibc (Linux), where it holds
    for the whole process; elsewhere nothing happens.
    """
    library = _glibc()
    if library is None:
        yield
        return
    for option, value in _KEPT:
        library.mallopt(option, value)
    try:
        yield
    finally:
        for option, value in _USUAL:
            library.mallopt(option, value)
        library.malloc_trim(0)


def _glibc() -> ctypes.CDLL | None:
    """The C library, if it is glibc."""
    if not sys.platform.startswith("linux"):
        return None
    library = ctypes.CDLL(None)
    return library if hasattr(library, "gnu_get_libc_version") else None
