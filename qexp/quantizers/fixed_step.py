"""Activations rounded to integers: the step is fixed at one."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from qexp.numerics.ops import round_to
from qexp.quantizers.base import AffineQuantizer
from qexp.statistics.stats import TensorStats


class _Steps(torch.autograd.Function):
    """`clip(round(x), qmin, qmax)`; the gradient passes strictly inside the limits."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, qmin: float, qmax: float, rounding: str) -> Tensor:
        ctx.save_for_backward((x > qmin) & (x < qmax))
        return round_to(x.float(), rounding).clamp(qmin, qmax).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (inside,) = ctx.saved_tensors
        return grad * inside, None, None, None


class FixedStep(AffineQuantizer):
    """`clip(round(x), 0, 2^bits - 1)`: the codes are the values.

    Levels: 2^bits, one apart, for any data. Ties: by `rounding`, half to even by default. Gradient: 1 strictly inside,
    `0 < x < 2^bits - 1`, else 0. No initialisation: calibration only decides the sign of an `auto` grid. Saved: the grid's limits.
    Suited to tensors with a spread of a few units, such as the result of a batch norm.

    Args:
        bits, shape, rounding: See `AffineQuantizer`.
        granularity: Ignored, because the step is fixed.
        signed: False clips at zero, as published; True uses `-2^(bits-1) .. 2^(bits-1) - 1`, `auto` if the tensor has negative values.

    Source: Quantized_ResNet, "2-bit feature maps".
    Differs from the source: the signed grid, for tensors without a ReLU before them.

    >>> q = FixedStep(2, (1,), signed=False)
    >>> q.fit(TensorStats.of(torch.tensor([0.0, 3.7])))
    >>> q(torch.tensor([-1, 0.5, 1.5, 2.51, 3.7])).tolist()
    [0.0, 0.0, 2.0, 3.0, 3.0]
    """

    sites = frozenset({"input", "output"})

    def __init__(
        self,
        bits: int,
        shape: tuple[int, ...] = (1,),
        *,
        signed: bool | Literal["auto"] = "auto",
        **common: Any,
    ) -> None:
        super().__init__(bits, shape, signed=signed, **common)
        self.register_buffer("scale", torch.ones(1), persistent=False)
        self.register_buffer("zero_point", torch.zeros(1), persistent=False)

    def fit(self, stats: TensorStats, followed_by_relu: bool = False) -> None:
        self.follow_sign(stats, followed_by_relu)
        self.mark_ready()

    def rounded(self, rows: Tensor, axis: int | None) -> Tensor:
        return _Steps.apply(rows, *map(float, self.limits), self.rounding)

    def describe(self) -> dict[str, Any]:
        return super().describe() | {"range": "step 1"}
