"""The user's own folder of configuration files on Hydra's search path."""

from __future__ import annotations

from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.plugins import Plugins
from hydra.plugins.search_path_plugin import SearchPathPlugin

from qexp.command.folders import beside


class FolderBeside(SearchPathPlugin):
    """Appends `conf/` where the user stands, so that its files join the groups; where names are equal, qexp's own file counts."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        for folder in beside():
            search_path.append("qexp", f"file://{folder}")


def register() -> None:
    """Registers the folder with Hydra; a second call changes nothing."""
    Plugins.instance().register(FolderBeside)
