"""The representable values (grid), the elements that share a scale (granularity), and the arithmetic of rounding (ops)."""

from qexp.numerics.granularity import Granularity, PerChannel, PerGroup, PerTensor
from qexp.numerics.grid import LevelGrid, UniformGrid

__all__ = ["Granularity", "LevelGrid", "PerChannel", "PerGroup", "PerTensor", "UniformGrid"]
