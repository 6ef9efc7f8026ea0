"""Two's complement fixed point: the scale is a power of two, one per tensor."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from qexp.errors import QexpError
from qexp.numerics.grid import UniformGrid
from qexp.quantizers.base import GridQuantizer
from qexp.ranges import Context, PowerOfTwo, RangeRule
from qexp.ranges.base import rule_or
from qexp.statistics.stats import TensorStats


class FixedPoint(GridQuantizer):
    """`x^ = clip(round(x * 2^f), -2^(bits-1), 2^(bits-1) - 1) * 2^-f` with `f = bits - 1 - sf` fractional bits.

    `sf` is the number of integer bits (without the sign) from the range rule; f may be negative, or above `bits`. Levels: 2^bits. One bit
    is a sign: the values are -2^sf and 2^sf, and zero counts as positive. Ties: by `rounding`, half to even by default. Gradient: 1
    within the limits (included), else 0. Saved: the scale 2^-f.

    Args:
        bits, shape, granularity, rounding: As for every quantizer.
        range: Rule whose range ends at a power of two.

    Source: the arithmetic of imagenet-cnn-quantization; its parent, pytorch-playground, names `f` directly and rounds half up.
    Differs from the source: one bit is a sign, while the source has the values -2, -1, 0 steps; the tensor is never changed in place.

    >>> q = FixedPoint(8, (7,))
    >>> x = torch.tensor([0.1, -0.7, 1, 1.3, -1.3, 2.5, -2.5])
    >>> q.fit(TensorStats.of(x))
    >>> q.integer_bits, q.codes(x).int().tolist()
    (2, [3, -22, 32, 42, -42, 80, -80])
    """

    def __init__(
        self,
        bits: int,
        shape: tuple[int, ...] = (1,),
        *,
        range: RangeRule | None = None,
        **common: Any,
    ) -> None:
        super().__init__(bits, shape, **common)
        self.range = rule_or(range, PowerOfTwo())
        self.hold_scale(zero_point=0.5 if bits == 1 else 0.0)
        self.symmetric = bits > 1
        self._fraction_bits = 0

    def fit(self, stats: TensorStats, followed_by_relu: bool = False) -> None:
        _, high = self.range(stats, UniformGrid(max(self.bits, 2)), Context(True, followed_by_relu))
        mantissa, _ = torch.frexp(high)
        if not bool((torch.isfinite(high) & (mantissa == 0.5)).all()):
            raise QexpError(
                f"{self.name}: the range from {type(self.range).__name__} does not end at a power of two, which fixed point needs; "
                "use PowerOfTwo"
            )
        self.put(scale=(high / 2.0 ** (self.bits - 1)).clamp_min(2.0**-126))
        if self.bits == 1:
            self.scale.mul_(2)  # codes 0 and 1 represent -2^sf and 2^sf
        self._read_scale()
        self.mark_ready()

    @property
    def fraction_bits(self) -> int:
        """Fractional bits (per tensor only); a host value, without synchronising with the device."""
        return self._fraction_bits

    @property
    def integer_bits(self) -> int:
        """Integer bits, without the sign (per tensor only)."""
        return self.bits - 1 - self._fraction_bits

    def _read_scale(self) -> None:
        if self.scale.numel() == 1:
            self._fraction_bits = -round(math.log2(float(self.scale))) + int(self.bits == 1)

    @property
    def limits(self) -> tuple[int, int]:
        return (0, 1) if self.bits == 1 else (-(2 ** (self.bits - 1)), 2 ** (self.bits - 1) - 1)

    def rounded(self, rows: Tensor, axis: int | None) -> Tensor:
        return super().rounded(rows, axis) if self.bits > 1 else _Sign.apply(rows, self._reach(rows, axis))

    def codes(self, x: Tensor) -> Tensor:
        self.require_ready()
        return super().codes(x) if self.bits > 1 else (x >= 0).int()

    def _reach(self, x: Tensor, axis: int | None) -> Tensor:
        """Returns `2^sf`, the magnitude of the one-bit form, in a shape that broadcasts against `x`."""
        if axis is None:
            return self.scale / 2
        return (self.scale / 2).reshape([-1 if d == axis % x.ndim else 1 for d in range(x.ndim)])

    def describe(self) -> dict[str, Any]:
        return super().describe() | {"signed": True}

    def _load_from_state_dict(self, *args: Any) -> None:
        super()._load_from_state_dict(*args)
        self._read_scale()


class _Sign(torch.autograd.Function):
    """`reach` where `x >= 0`, else `-reach`; the gradient passes where `|x| <= reach`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, reach: Tensor) -> Tensor:
        wide = x.float()
        ctx.save_for_backward(wide.abs() <= reach)
        return torch.where(wide.isnan(), wide, torch.where(wide >= 0, reach, -reach)).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (inside,) = ctx.saved_tensors
        return grad * inside, None
