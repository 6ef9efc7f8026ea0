"""The user's own folders on Hydra's and on Python's search path."""

from __future__ import annotations

import sys
from pathlib import Path

from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.plugins import Plugins
from hydra.plugins.search_path_plugin import SearchPathPlugin

from qexp.command.folders import beside
from qexp.command.plugins import own_folders


class OwnFolders(SearchPathPlugin):
    """Appends `conf/` where the user stands and the folders of plugins, so that their files join the groups."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        for folder in (*beside(), *own_folders()):
            search_path.append("qexp", f"file://{folder}")


def register() -> None:
    """Registers the folders with Hydra, and puts the folder where the user stands at the end of Python's path; twice changes nothing.

    So `_target_: mypkg.nets.Net` finds a package that lies beside the user, and none of its modules hides a library's.
    """
    here = str(Path.cwd())
    if here not in sys.path and "" not in sys.path:
        sys.path.append(here)
    Plugins.instance().register(OwnFolders)
