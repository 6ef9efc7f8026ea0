"""Pairs of widths as choices of `bits=` that need no file: `bits=w2a3` is `layer_wbit=2 layer_abit=3`."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

from hydra.core.config_store import ConfigNode, ConfigStore
from omegaconf import OmegaConf

from qexp.command.folders import config_folders

ALLOWED = (*range(1, 17), 32)  # 32 is float
SPELLED = "w<m>a<n> (m-bit weights, n-bit inputs, 1 to 16 or 32: w4a8, w2a3, w1a32)"


def pair(name: str) -> tuple[int, int] | None:
    """Returns the widths of weights and inputs in a choice such as `w4a8`; None for any other choice.

    >>> pair("w2a3"), pair("w1a32"), pair("w0a8"), pair("fx8")
    ((2, 3), (1, 32), None, None)
    """
    found = re.fullmatch(r"w([1-9]\d?)a([1-9]\d?)", name)
    widths = (int(found[1]), int(found[2])) if found else None
    return widths if widths and set(widths) <= set(ALLOWED) else None


class Pairs(dict):
    """The entries of Hydra's store for `bits`; creates a pair at its first use, unless a file has its name.

    Two hundred entries made in advance would add a fifth of a second to every start, and fill each list of choices.
    """

    def __contains__(self, file: object) -> bool:
        return super().__contains__(file) or self._spelled(str(file)) is not None

    def __missing__(self, file: str) -> ConfigNode:
        widths = self._spelled(file)
        if widths is None:
            raise KeyError(file)
        node: Any = OmegaConf.create({"layer_wbit": widths[0], "layer_abit": widths[1]})
        return ConfigNode(name=file, node=node, group="bits", package="_global_", provider="qexp")

    @staticmethod
    def _spelled(file: str) -> tuple[int, int] | None:
        if any((folder / "bits" / file).is_file() for folder in config_folders(sys.argv)):
            return None
        return pair(Path(file).stem)


def register() -> None:
    """Registers every pair of widths with Hydra as a choice of `bits=`."""
    ConfigStore.instance().repo.setdefault("bits", Pairs())
