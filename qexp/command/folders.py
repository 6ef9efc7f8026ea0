"""Folders of configuration files: `conf/`, and the folders that `--config-dir` names."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

CONF = Path(__file__).parents[2] / "conf"


def config_folders(arguments: Sequence[str], conf: Path = CONF) -> list[Path]:
    """Returns the folders with configuration files for a command line."""
    return [folder for folder in (conf, *map(Path, _config_dirs(arguments))) if folder.is_dir()]


def beside() -> None:
    """Puts the folder where the user stands at the end of Python's path, if it is not there yet."""
    here = str(Path.cwd())
    if here not in sys.path and "" not in sys.path:
        sys.path.append(here)


def _config_dirs(arguments: Sequence[str]) -> Iterator[str]:
    for word, following in zip(arguments, [*arguments[1:], ""]):
        name, is_joined, value = word.partition("=")
        if name in ("--config-dir", "-cd"):
            yield value if is_joined else following
