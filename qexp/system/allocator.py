"""Allocator and garbage-collector settings for a process that only runs experiments: freed memory is kept for reuse."""

from __future__ import annotations

import atexit
import ctypes
import gc
from collections.abc import Callable
from functools import cache

# names and numbers of glibc's <malloc.h>
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_MIB = 2**20


@cache
def settle() -> None:
    """Keeps up to 512 MiB of freed memory and exempts existing objects from garbage collection. Runs once per process.

    Blocks of 64 MiB and more (32 MiB with older glibc, which allows no higher limit) are still returned at once.

    glibc hands freed memory back at once, and the next batch's activations, tens of MiB each, cost a page fault for every 4 KiB. What
    imports have made, some 600,000 objects, lives as long as the process. Both are choices for a whole process, so that a program makes
    them and no library function does.
    """
    gc.freeze()
    atexit.register(gc.unfreeze)  # the interpreter destroys all objects at exit
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:  # not every system has glibc
        _keep(mallopt)


def _keep(mallopt: Callable[[int, int], int]) -> None:
    """Sets the limits through `mallopt(number, value)`, which returns 0 for a value that it rejects.

    It sets the second limit only if glibc accepts the first: either one ends glibc's own adjustment of both, and the first would
    stay at 128 KiB.
    """
    if mallopt(_M_MMAP_THRESHOLD, 64 * _MIB) or mallopt(_M_MMAP_THRESHOLD, 32 * _MIB):
        mallopt(_M_TRIM_THRESHOLD, 512 * _MIB)
