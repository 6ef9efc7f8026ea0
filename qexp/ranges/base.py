"""What a range rule is given besides the statistics."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from qexp.errors import QexpError
from qexp.numerics.grid import UniformGrid
from qexp.statistics.stats import TensorStats


@dataclass(frozen=True)
class Context:
    """Facts about the tensor that its values alone do not tell.

    Attributes:
        symmetric: The range will be used as `[-a, a]` (or `[0, a]` on an unsigned grid), with zero point 0.
        followed_by_relu: The tensor goes straight into a ReLU, so that its negative part is lost anyway.
        parameters: `(low, high) -> (scale, zero_point)`, both `[G]`, as the quantizer will compute them: what a search must try.
            Several ranges at once, `[N, G]`, give as many scales.
    """

    symmetric: bool = True
    followed_by_relu: bool = False
    parameters: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None = None


class RangeRule(Protocol):
    """Picks the range `(low, high)`, float64 `[G]` each, that the quantizer's levels are to span."""

    def __call__(self, stats: TensorStats, grid: UniformGrid, context: Context) -> tuple[Tensor, Tensor]: ...


def rule_or(given: RangeRule | None, default: RangeRule) -> RangeRule:
    """Returns the range rule that is given, or the default where none is.

    Raises:
        QexpError: A number or a word was given.
    """
    if given is None:
        return default
    if not callable(given):
        raise QexpError(
            f"range={given} is not allowed; use a mapping that makes a range rule, such as {{_target_: qexp.ranges.MSE}}"
        )
    return given
