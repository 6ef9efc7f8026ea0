"""PACT as in Quantized_ResNet: plain gradient descent updates the clip at every training step."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from qexp.quantizers.pact import PACT
from qexp.ranges import RangeRule
from qexp.statistics.stats import TensorStats

_GUARD = 1e-6  # from the source, against a clip of zero; it sends ties to the lower level


def _steps(x: Tensor, clip: Tensor, qmin: float, qmax: float) -> Tensor:
    """Returns the codes of `x`, in the wider of float32 and its own precision."""
    wide = x if x.dtype == torch.float64 else x.float()
    return torch.round(wide * qmax / (clip.to(wide.dtype) + _GUARD)).clamp(qmin, qmax)


class _ClippedSteps(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, clip: Tensor, qmin: float, qmax: float) -> Tensor:
        ctx.save_for_backward(x, clip)
        ctx.two_sided = qmin < 0
        return (_steps(x, clip, qmin, qmax) * (clip / qmax)).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, clip = ctx.saved_tensors
        inside = (x > (-clip if ctx.two_sided else 0)) & (x < clip)
        beyond = (x > clip).to(grad.dtype)
        if ctx.two_sided:
            beyond = beyond - (x < -clip).to(grad.dtype)
        return grad * inside, (grad * beyond).sum().to(clip.dtype), None, None


class PACTInStep(PACT):
    """`clip(round(x n / (T + 1e-6)), 0, n) T / n` with a clip T that starts at n, so that the initial step is 1.

    Levels: one-sided 2^bits (n = 2^bits - 1); two-sided, `[-T, T]`, 2^bits - 1. Half to even, but because of the
    1e-6 a tie goes to the lower level. Gradients: to x, 1 strictly inside `0 < x < T` (`|x| < T`); to T, 1 where `x > T` (minus 1 where
    `x < -T`). The source's update `T <- T - 0.01 (sum of those + 2e-4 T)` equals SGD on T in a parameter group with rate 0.01, no
    momentum and weight decay 2e-4, as its recipe sets. Saved: T (as `alpha`), the grid's limits. T is at least 1e-3.

    Args:
        bits, shape, granularity, rounding, signed, learned: See `PACT`.
        range: The first T: `levels` is n; or a number, or a range rule.

    Source: Quantized_ResNet, after Choi et al. 2018 (arXiv 1805.06085).
    Differs from the source: T is a saved parameter, shared between processes, moved by the optimizer instead of in the backward pass;
    with a schedule its rate decreases as the others do.

    >>> q = PACTInStep(2, (6,), signed=False)
    >>> q.fit(TensorStats.of(torch.tensor([0.0, 4.0])))
    >>> q(torch.tensor([-1, 0.5, 1.2, 2.9, 3.1, 4])).tolist()
    [0.0, 0.0, 1.0, 3.0, 3.0, 3.0]
    """

    def __init__(
        self,
        bits: int,
        shape: tuple[int, ...] = (1,),
        *,
        range: float | RangeRule | Literal["levels"] = "levels",
        **common: Any,
    ) -> None:
        super().__init__(bits, shape, range=range, **common)
        if range == "levels":
            self.alpha.data.fill_(float(2**bits - 1))

    def first_alpha(self, stats: TensorStats, followed_by_relu: bool) -> float:
        return float(self.limits[1]) if self.range == "levels" else super().first_alpha(stats, followed_by_relu)

    def rounded(self, rows: Tensor, axis: int | None) -> Tensor:
        return _ClippedSteps.apply(rows, self.alpha, *map(float, self.limits))

    def codes(self, x: Tensor) -> Tensor:
        self.require_ready()
        return _steps(x.detach(), self.alpha.detach(), *map(float, self.limits)).float()
