"""Stamps of files: what shows that files have not changed since they were read, without reading them again."""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple


class Stamp(NamedTuple):
    """The state of some files: a hash of their names, sizes and times, and the time of the last change in nanoseconds."""

    digest: str
    changed: int


def stamp(paths: Iterable[Path]) -> Stamp:
    """Returns the state of files and of everything below folders; a missing file is a state too.

    Python's caches and what links to folders point to are left out. The time of a change of the inode counts besides that of the content,
    since copying can set the latter.
    """
    digest, changed = hashlib.sha256(), 0
    for path in paths:
        for name, state in _states(path):
            digest.update(f"{name}\0{state and _identity(state)}\n".encode(errors="surrogateescape"))
            changed = max(changed, state.st_mtime_ns, state.st_ctime_ns) if state else changed
    return Stamp(digest.hexdigest(), changed)


def _states(path: Path) -> Iterator[tuple[Path, os.stat_result | None]]:
    """Yields a path with its state, None where it is missing, then what lies below it."""
    try:
        state = path.stat()
    except OSError:
        yield path, None
        return
    yield path, state
    if stat.S_ISDIR(state.st_mode):
        for below in sorted(path.iterdir()):
            if below.name != "__pycache__" and not (below.is_symlink() and below.is_dir()):
                yield from _states(below)


def _identity(state: os.stat_result) -> tuple[int, ...]:
    return state.st_size, state.st_mtime_ns, state.st_ctime_ns, state.st_ino
