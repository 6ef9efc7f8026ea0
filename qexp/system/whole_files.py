"""Files that are there whole or not at all, however many processes and threads write them and however a writer ends."""

from __future__ import annotations

import os
import re
import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path

ROOM = 200  # characters of a part's name that the file's own may have; file systems allow 255 bytes
PART = re.compile(r"\.(?P<process>\d+)\.part$")  # the end of a part's name: which process writes it


@contextmanager
def whole(path: str | Path) -> Iterator[Path]:
    """Yields a name beside `path` to write to; what was written there becomes `path` in one step when the block ends.

    A reader sees the old file or the new one, never half. Two writers at once have a part each; the last to finish wins. Where the
    block raises, the part is removed and `path` stays as it was. The content is on the disk before the name is, so that a machine
    that loses power leaves no empty file under the name.

    Args:
        path: The file; its folder is made where it is missing.

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
    # Threads of one process differ by the random digits.
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
    """Returns `path` after a text was written to it, whole or not at all; what UTF-8 cannot hold becomes a question mark."""
    return write_bytes(path, text.encode("utf-8", errors="replace"))


def write_bytes(path: Path, content: bytes) -> Path:
    """Returns `path` after bytes were written to it, whole or not at all."""
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
    """Whether a process of this machine runs under this number."""
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except OSError:  # someone else's
        return True
    return True
