"""Uniform affine quantization: evenly spaced levels over a range that a rule picks."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from qexp.quantizers.base import AffineQuantizer, fit_range
from qexp.ranges import Context, MinMax, RangeRule
from qexp.ranges.base import rule_or
from qexp.statistics.stats import TensorStats


class Uniform(AffineQuantizer):
    """`codes = round(clip(x / scale + zero_point, qmin, qmax))`, `x^ = (codes - zero_point) * scale`.

    Levels: 2^bits; 2^bits - 1 where signed and narrow. Symmetric: zero point 0, scale = max(|low|, |high|) / qmax. Affine: unsigned
    codes, the range extended to include zero, an integer zero point inside the grid. Zero is always a level. Gradient: 1 within the
    limits (included), else 0. Saved: scale, zero_point, the grid's limits. For a range without width (a constant tensor) the scale is
    chosen so that the constant is the last level and passes unchanged.

    Args:
        bits, shape, granularity, rounding, signed, narrow: See `AffineQuantizer`.
        symmetric: Zero point 0; otherwise affine.
        range: Rule that picks the range.
        pow2_scale: Round the scale up to a power of two.

    Source: Jacob et al. 2018 (arXiv 1712.05877); symmetric weights as in Krishnamoorthi 2018 (arXiv 1806.08342).

    >>> q = Uniform(4, (6,), symmetric=False)
    >>> x = torch.tensor([-1, -0.4, 0, 0.25, 0.55, 2])
    >>> q.fit(TensorStats.of(x))
    >>> q.codes(x).int().tolist()
    [0, 3, 5, 6, 8, 15]
    """

    correctable = True

    def __init__(
        self,
        bits: int,
        shape: tuple[int, ...] = (1,),
        *,
        signed: bool | Literal["auto"] = "auto",
        narrow: bool = False,
        symmetric: bool = True,
        range: RangeRule | None = None,
        pow2_scale: bool = False,
        **common: Any,
    ) -> None:
        super().__init__(bits, shape, signed=signed if symmetric else False, narrow=narrow, **common)
        self.symmetric, self.range, self.pow2_scale = symmetric, rule_or(range, MinMax()), pow2_scale
        self.hold_scale()

    def fit(self, stats: TensorStats, followed_by_relu: bool = False) -> None:
        if self.symmetric:
            self.choose_sign(stats)
        context = Context(self.symmetric, followed_by_relu, self.parameters_of)
        low, high = fit_range(self, self.range, stats, context)
        scale, zero_point = self.parameters_of(low, high)
        self.put(scale=scale, zero_point=zero_point)
        self.mark_ready()

    def range_key(self) -> bool:
        return self.pow2_scale

    def parameters_of(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the scale and the zero point, float32 `[G]`, for a range `(low, high)` `[G]`."""
        qmin, qmax = (torch.as_tensor(q, dtype=torch.float64, device="cpu").flatten() for q in self.limits)
        low, high = low.clamp_max(0), high.clamp_min(0)
        if self.symmetric:
            span, steps = torch.maximum(-low, high), qmax
        else:
            span, steps = high - low, qmax - qmin
        scale = torch.where((span > 0) & (steps > 0), span / steps.clamp_min(1), torch.ones_like(span))
        scale = scale.clamp_min(torch.finfo(torch.float32).tiny)
        if self.pow2_scale:
            scale = torch.exp2(torch.ceil(torch.log2(scale)))
        scale = scale.float()
        if self.symmetric:
            return scale, torch.zeros_like(scale)
        zero_point = torch.round(qmin - low / scale.double())
        return scale, torch.maximum(torch.minimum(zero_point, qmax), qmin).float()
