"""How a process that does nothing but run points keeps its memory: what it frees it soon needs again."""

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
    """Lets the allocator keep up to 512 MiB of freed memory, and the garbage collector pass over all that exists by now; once a process.

    Blocks of 64 MiB and more (32 MiB with older glibc, which takes no higher limit) still go back at once.

    glibc hands freed memory back at once, and the next batch's activations, tens of MiB each, cost a page fault for every 4 KiB. What
    imports have made, some 600,000 objects, lives as long as the process. Both are choices for a whole process, so that a program makes
    them and no library function does.
    """
    gc.freeze()
    atexit.register(gc.unfreeze)  # at its end the interpreter takes everything apart
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:  # not everywhere is glibc
        _keep(mallopt)


def _keep(mallopt: Callable[[int, int], int]) -> None:
    """Sets the limits through `mallopt(number, value)`, which returns 0 for a value it refuses.

    The second limit is set only where the first was taken: either ends glibc's own adapting of both, and the first would stay at 128 KiB.
    """
    if mallopt(_M_MMAP_THRESHOLD, 64 * _MIB) or mallopt(_M_MMAP_THRESHOLD, 32 * _MIB):
        mallopt(_M_TRIM_THRESHOLD, 512 * _MIB)
