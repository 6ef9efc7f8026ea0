"""A lock per folder between processes; the system releases it whenever its holder ends."""

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
    """Context manager: only one process at a time is inside for a folder; makes the folder if it is missing.

    Args:
        folder: The folder to lock, by a file `.lock` in it.
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
        # Some network file systems have no locks: two sweeps may then repeat work, but results stay correct.
        except OSError as error:
            log.warning("%s: this file system has no locks (%s)", folder, error)
        yield
