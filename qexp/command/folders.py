"""Folders of configuration files: qexp's own, `conf/` where the user stands, those of plugins, and those a command line names."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from qexp.command.plugins import own_folders

PACKAGE = Path(__file__).parents[1]
# A wheel carries the folder inside the package; a clone keeps it beside the package, at its top.
CONF = next((folder for folder in (PACKAGE / "conf", PACKAGE.parent / "conf") if folder.is_dir()), PACKAGE / "conf")


def config_folders(arguments: Sequence[str], conf: Path = CONF) -> list[Path]:
    """Returns the folders with configuration files for a command line, each once."""
    found: dict[Path, Path] = {}
    for folder in (conf, *beside(conf), *own_folders(), *map(Path, _config_dirs(arguments))):
        if folder.is_dir():
            found.setdefault(folder.resolve(), folder)
    return list(found.values())


def beside(conf: Path = CONF) -> list[Path]:
    """Returns the folder `conf` where the user stands, if it is not qexp's own, as a list of one or none.

    A folder with a `config.yaml` is the whole configuration of another program, and is left out.
    """
    here = Path.cwd() / "conf"
    if not here.is_dir() or (here / "config.yaml").exists() or here.resolve() == conf.resolve():
        return []
    return [here]


def _config_dirs(arguments: Sequence[str]) -> Iterator[str]:
    """Yields the folders of `--config-dir` and of `hydra.searchpath=[file://...]`."""
    for word, following in zip(arguments, [*arguments[1:], ""]):
        name, is_joined, value = word.partition("=")
        if name in ("--config-dir", "-cd"):
            yield value if is_joined else following
        elif name.lstrip("+") == "hydra.searchpath":
            yield from re.findall(r"file://([^,\]\s'\"]+)", value)
