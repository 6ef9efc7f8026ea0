"""Which values exist (grid), who shares a scale (granularity), and how a number reaches its level (ops)."""

from qexp.numerics.granularity import Granularity, PerChannel, PerGroup, PerTensor
from qexp.numerics.grid import LevelGrid, UniformGrid

__all__ = ["Granularity", "LevelGrid", "PerChannel", "PerGroup", "PerTensor", "UniformGrid"]
