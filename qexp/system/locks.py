"""A lock per folder, held between processes: released by the system when its holder ends, however it ends."""

from __future__ import annotations

import fcntl
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
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
        # Some network file systems have no locks: two sweeps may then do work twice, never wrongly.
        except OSError as error:
            log.warning("%s: this file system has no locks (%s)", folder, error)
        yield
