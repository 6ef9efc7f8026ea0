"""Atomic writing of files: a file is complete or does not exist, for any number of writers and any way they end."""

from __future__ import annotations

import os
import re
import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path

ROOM = 200  # characters of the file's own name that a part's name keeps; file systems allow 255 bytes
PART = re.compile(r"\.(?P<process>\d+)\.part$")  # the end of a part's name identifies the process that writes it


@contextmanager
def whole(path: str | Path) -> Iterator[Path]:
    """Yields a name beside `path` to write to; the written file becomes `path` in one step when the block ends.

    A reader sees the old file or the new one, never half. Two writers at once have a part each; the last to finish wins. If the
    block raises, the part is removed and `path` does not change. The content is on the disk before the name, so that a power
    failure leaves no empty file under the name.

    Args:
        path: The file; its folder is made if it is missing.

    Example:
        >>> import tempfile
        >>> folder = Path(tempfile.mkdtemp())
        >>> with whole(folder / "a" / "table.csv") as part:
        ...     _ = part.write_text("1,2")
        >>> [file.name for file in (folder / "a").iterdir()]
        ['table.csv']
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # Random digits distinguish threads of one process.
    short = path.name.encode()[:ROOM].decode(errors="ignore")
    part = path.with_name(f".{short}.{secrets.token_hex(4)}.{os.getpid()}.part")
    try:
        yield part
        with part.open("rb") as written:
            os.fsync(written.fileno())
        part.replace(path)
    finally:
        with suppress(OSError):
            part.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> Path:
    """Writes a text atomically and returns `path`; characters that UTF-8 cannot hold become question marks."""
    return write_bytes(path, text.encode("utf-8", errors="replace"))


def write_bytes(path: Path, content: bytes) -> Path:
    """Writes bytes atomically and returns `path`."""
    with whole(path) as part:
        part.write_bytes(content)
    return path


@cache  # once per process
def remove_leftovers(folder: Path, age: float = 60.0) -> None:
    """Removes the parts that killed processes left anywhere below a folder.

    Args:
        folder: A cache; it may be missing.
        age: Seconds without a change, after which not even a process on another machine that shares the folder is still writing.
    """
    for part in folder.rglob("*.part"):
        writer = PART.search(part.name)
        with suppress(OSError):
            if writer and time.time() - part.stat().st_mtime > age and not _lives(int(writer["process"])):
                part.unlink()


def _lives(process: int) -> bool:
    """Whether a process with this number runs on this machine."""
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except OSError:  # someone else's
        return True
    return True
