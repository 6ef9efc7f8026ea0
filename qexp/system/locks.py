"""A lock a folder, held between processes: released by the system when its holder ends, however it ends."""

from __future__ import annotations

import fcntl
import logging
import os
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path

from qexp.errors import QexpError

log = logging.getLogger(__name__)


@contextmanager
def locked(folder: Path, waiting: Callable[[], None] | None = None) -> Iterator[None]:
    """Inside, no other process is inside for the same folder; the folder is made where it is missing.

    Args:
        folder: What is locked, by a file `.lock` in it.
        waiting: Called once if another process is inside, before waiting for it.

    Raises:
        QexpError: The folder cannot be made, or written to.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / ".lock").open("w")
    except OSError as error:
        raise QexpError(
            f"{folder}: cannot be made or written to ({error.strerror}); change its permissions, make room, or choose another runs_dir"
        ) from error
    with lock as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if waiting is not None:
                waiting()
            fcntl.flock(file, fcntl.LOCK_EX)
        except (
            OSError
        ) as error:  # some network file systems have no locks: two sweeps may then do work twice, never wrongly
            log.warning("%s: this file system has no locks (%s)", folder, error)
        yield


@cache  # once a process
def remove_leftovers(folder: Path, age: float = 60.0) -> None:
    """Removes what killed processes were writing anywhere below a folder: `NAME.PID.part` files of processes that are gone.

    Args:
        folder: A cache; it may be missing.
        age: Seconds without a change, after which not even a process on another machine that shares the folder is still writing.
    """
    for part in folder.rglob("*.part"):
        number = re.search(r"\.(\d+)\.part$", part.name)
        with suppress(OSError):
            is_old = time.time() - part.stat().st_mtime > age
            if is_old and not (number and _lives(int(number[1]))):
                part.unlink()


def _lives(process: int) -> bool:
    """Whether a process of this machine runs under this number."""
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except OSError:  # someone else's
        return True
    return True
