"""The head comment of a recipe's file: one line that describes the method, and when to use it."""

from __future__ import annotations

from itertools import takewhile
from pathlib import Path

_WHEN = "When:"


def headline(file: Path) -> str:
    """Returns the first line, which describes the method."""
    return next(iter(_head(file)), "")


def when(file: Path) -> str:
    """Returns what follows `# When:` in the head comment: when to use the method; empty if the file has no such line."""
    text = " ".join(_head(file))
    return text.partition(_WHEN)[2].strip()


def _head(file: Path) -> list[str]:
    lines = takewhile(lambda line: line.startswith("#"), file.read_text().splitlines())
    return [line.lstrip("# ").rstrip() for line in lines]
