"""Folders of YAML that are not qexp's: of `QEXP_CONFIG_PATH`, and of installed packages with an entry point in the group `qexp.plugins`.

A folder holds groups as `conf/` does: `model/NAME.yaml`, `quant/NAME.yaml`, `dataset/NAME.yaml`. A package names itself in its
`pyproject.toml` (`[project.entry-points."qexp.plugins"]`, `shapes = "qexp_shapes"`); its folder is `conf/` inside the package, or the
package itself where it has no `conf/`.
"""

from __future__ import annotations

import os
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from importlib.util import find_spec
from pathlib import Path

from qexp.errors import QexpError

VARIABLE, GROUP = "QEXP_CONFIG_PATH", "qexp.plugins"


def own_folders() -> list[Path]:
    """Returns the folders of `QEXP_CONFIG_PATH` and of installed plugins.

    Raises:
        QexpError: A folder does not exist, or a plugin's package cannot be found.
    """
    return list(_folders(os.environ.get(VARIABLE, "")))


@cache
def _folders(named: str) -> tuple[Path, ...]:
    found = []
    for text in filter(None, named.split(os.pathsep)):
        folder = Path(text).expanduser().absolute()
        if not folder.is_dir():
            raise QexpError(
                f"{VARIABLE}={text}: there is no such folder; name folders that hold groups (model/NAME.yaml, ...)"
            )
        found.append(folder)
    return (*found, *(folder_of(plugin) for plugin in plugins()))


def plugins() -> list[EntryPoint]:
    """Returns the entry points of installed plugins, by name."""
    return sorted(entry_points(group=GROUP), key=lambda point: point.name)


def folder_of(plugin: EntryPoint) -> Path:
    """Returns a plugin's folder of YAML; the package is not imported.

    Raises:
        QexpError: There is no such package.
    """
    try:
        spec = find_spec(plugin.module)
    except (ImportError, ValueError):
        spec = None
    places = list(spec.submodule_search_locations or []) if spec else []
    if not places:
        raise QexpError(
            f"the plugin {plugin.name!r} names {plugin.value}, which is no package (a folder with __init__.py); it has to hold conf/"
        )
    package = Path(places[0])
    return package / "conf" if (package / "conf").is_dir() else package
