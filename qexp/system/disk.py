"""Describes errors of disks that are full, read-only or owned by another user, in one sentence."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator

SENTENCES = {
    errno.ENOSPC: "the disk is full; make room and repeat the command, which goes on from what is there",
    errno.EDQUOT: "the quota of disk space is used up; make room and repeat the command, which goes on from what is there",
    errno.EFBIG: "a file would be larger than this system allows (ulimit -f); raise the limit and repeat the command",
    errno.EROFS: "the file system is read-only; choose another folder with runs_dir=",
    errno.EACCES: "the folder or file may not be written or read; change its permissions, or choose another folder with runs_dir=",
    errno.EPERM: "the folder or file may not be changed; change its permissions, or choose another folder with runs_dir=",
}
TEXTS = {
    os.strerror(number): number for number in SENTENCES
}  # messages of libraries that pass on only the system's text
TORN = ("PytorchStreamWriter failed", "unexpected pos ")  # messages of torch.save after an incomplete write


def trouble(error: BaseException) -> str | None:
    """Returns one sentence on the disk's fault if an error or its cause is a disk error; None for other errors."""
    chain = list(_chain(error))
    for one in chain:
        number = one.errno if isinstance(one, OSError) else None
        number = number if number in SENTENCES else next((n for text, n in TEXTS.items() if text in str(one)), None)
        if number is not None and not isinstance(one, ConnectionError):
            where = f"{one.filename}: " if isinstance(one, OSError) and one.filename else ""
            return f"{where}{SENTENCES[number]}"
    if any(text in str(one) for one in chain for text in TORN):
        return "a file could not be written to its end; " + SENTENCES[errno.ENOSPC]
    return None


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__
