"""Range rules: pure functions from a tensor's statistics to the range `(low, high)` that the quantizer's levels span.

A rule is called as `rule(stats, grid, context)` and returns two float64 tensors `[G]`. It never receives data, a layer or a
configuration, so one calibration pass serves every method at every width.
"""

from qexp.ranges.aciq import ACIQ
from qexp.ranges.base import Context, RangeRule
from qexp.ranges.clip import Clip
from qexp.ranges.kl import KL
from qexp.ranges.minmax import Fixed, MinMax, MovingAverage
from qexp.ranges.mse import MSE
from qexp.ranges.percentile import Percentile
from qexp.ranges.power_of_two import PowerOfTwo

__all__ = [
    "ACIQ",
    "KL",
    "MSE",
    "Clip",
    "Context",
    "Fixed",
    "MinMax",
    "MovingAverage",
    "Percentile",
    "PowerOfTwo",
    "RangeRule",
]
