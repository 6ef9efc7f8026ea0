"""Folders of configuration files: `conf/`, those of plugins, and those that the command line names."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from qexp.command.plugins import own_folders

CONF = Path(__file__).parents[2] / "conf"


def config_folders(arguments: Sequence[str], conf: Path = CONF) -> list[Path]:
    """Returns the folders with configuration files for a command line."""
    return [folder for folder in (conf, *own_folders(), *map(Path, _config_dirs(arguments))) if folder.is_dir()]


def _config_dirs(arguments: Sequence[str]) -> Iterator[str]:
    """Yields the folders of `--config-dir` and of `hydra.searchpath=[file://...]`."""
    for word, following in zip(arguments, [*arguments[1:], ""]):
        name, is_joined, value = word.partition("=")
        if name in ("--config-dir", "-cd"):
            yield value if is_joined else following
        elif name.lstrip("+") == "hydra.searchpath":
            yield from re.findall(r"file://([^,\]\s'\"]+)", value)
