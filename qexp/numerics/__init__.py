"""The representable values (grid), the elements that share a scale (granularity), and the arithmetic of rounding (ops).

Importing the package loads no torch: `qexp.numerics.widths` is read before it is known whether a run has to be made.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qexp.numerics.granularity import Granularity, PerChannel, PerGroup, PerTensor
    from qexp.numerics.grid import LevelGrid, UniformGrid

__all__ = ["Granularity", "LevelGrid", "PerChannel", "PerGroup", "PerTensor", "UniformGrid"]
_HOMES = {name: "qexp.numerics.grid" if name.endswith("Grid") else "qexp.numerics.granularity" for name in __all__}


def __getattr__(name: str) -> Any:
    """Returns a grid or a granularity, imported when it is first used."""
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
