"""The settings of a run: the composed configuration, read once into plain values. Here every value gets its type and its bounds.

No other part takes a configuration node. `read` turns what Hydra composed into `Settings`; `Settings.of` does the same with a plain
mapping, such as the `config.yaml` of a run folder or a dictionary in a notebook.
"""

from qexp.run.settings.method import Integers, Method, Widths
from qexp.run.settings.network import Data, Network
from qexp.run.settings.schedule import Distill, Schedule
from qexp.run.settings.trainer import TrainerOptions
from qexp.run.settings.whole import Settings, read

__all__ = [
    "Data",
    "Distill",
    "Integers",
    "Method",
    "Network",
    "Schedule",
    "Settings",
    "TrainerOptions",
    "Widths",
    "read",
]
