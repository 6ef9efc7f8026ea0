"""The contract of a range rule, and the facts that it receives besides the statistics."""

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
    """Facts about the tensor that cannot be derived from its values.

    Attributes:
        symmetric: Whether the quantizer uses the range as `[-a, a]` (or `[0, a]` on an unsigned grid), with zero point 0.
        followed_by_relu: Whether the tensor goes straight into a ReLU, so that its negative part has no effect.
        parameters: `(low, high) -> (scale, zero_point)`, both `[G]`, as the quantizer computes them; a search tries these. For `[N, G]`
            ranges the scales are `[N, G]` too.
    """

    symmetric: bool = True
    followed_by_relu: bool = False
    parameters: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None = None


class RangeRule(Protocol):
    """Picks the range `(low, high)`, float64 `[G]` each, that the quantizer's levels span."""

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
