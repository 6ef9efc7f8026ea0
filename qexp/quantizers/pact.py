"""PACT and mPACT: the clip of an activation, one-sided or two-sided, is a learned parameter."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn

from qexp.numerics.ops import mpact, pact
from qexp.quantizers.base import AffineQuantizer, fit_range
from qexp.ranges import Context, RangeRule
from qexp.statistics.stats import TensorStats

_LEAST_ALPHA = 1e-3


class PACT(AffineQuantizer):
    """`x^ = round(clip(x, 0, alpha) * n / alpha) * alpha / n`; two-sided (mPACT) `clip(x, -alpha, alpha)` with `m` for `n`.

    Levels: one-sided 2^bits (n = 2^bits - 1); two-sided 2^bits - 1 (m = 2^(bits-1) - 1). Gradients: to x, 1 where `0 <= x <= alpha`
    (`|x| <= alpha`); to alpha, 1 where `x >= alpha` (less 1 where `x <= -alpha`); at equality both. alpha is one scalar, on the device,
    kept at 1e-3 or more after each optimizer step. Saved: alpha, the grid's limits.

    Args:
        bits, shape, granularity, rounding: See `AffineQuantizer`; one alpha per tensor.
        signed: False is PACT, True mPACT, `auto` mPACT where the tensor has negative values that no ReLU removes directly after.
        range: A number, or a range rule whose upper end is the first alpha.
        learned: Whether alpha is learned; otherwise it keeps its first value.

    Source: Choi et al. 2018 (arXiv 1805.06085), equations 1-3; mPACT as PACT-Quantization defines it.
    Differs from the paper: `auto`; alpha's decay is one number of its own parameter group, not counted twice.

    >>> q = PACT(4, (8,), signed=False, range=6.0)
    >>> q.fit(TensorStats.of(torch.tensor([0.0, 9.0])))
    >>> q(torch.tensor([-12, -3.2, -0.2, 0.4, 0.65, 1.7, 5.1, 9])).tolist()  # doctest: +ELLIPSIS
    [0.0, 0.0, 0.0, 0.4..., 0.8..., 1.6..., 5.2..., 6.0]
    """

    sites = frozenset({"input", "output"})
    granularities = ("tensor",)
    roundings = ("half_even",)

    def __init__(
        self,
        bits: int,
        shape: tuple[int, ...] = (1,),
        *,
        signed: bool | Literal["auto"] = "auto",
        range: float | RangeRule = 10.0,
        learned: bool = True,
        **common: Any,
    ) -> None:
        super().__init__(bits, shape, signed=signed, narrow=True, **common)
        self.range = range
        first = float(range) if isinstance(range, float | int) else 10.0
        self.alpha = nn.Parameter(torch.tensor(first), requires_grad=learned)

    def fit(self, stats: TensorStats, followed_by_relu: bool = False) -> None:
        self.follow_sign(stats, followed_by_relu)
        with torch.no_grad():
            self.alpha.fill_(max(self.first_alpha(stats, followed_by_relu), _LEAST_ALPHA))
        self.mark_ready()

    def first_alpha(self, stats: TensorStats, followed_by_relu: bool) -> float:
        """Returns the initial clip for training."""
        if isinstance(self.range, float | int):
            return float(self.range)
        _, high = fit_range(self, self.range, stats, Context(True, followed_by_relu, self._parameters_of))
        return float(high.max())

    def _parameters_of(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        scale = high / self.limits[1]
        return torch.where(scale > 0, scale, torch.ones_like(scale)), torch.zeros_like(scale)

    @property
    def scale(self) -> Tensor:
        """Real value of one code, `[]`."""
        return self.alpha.detach() / self.limits[1]

    @property
    def zero_point(self) -> Tensor:
        return torch.zeros_like(self.alpha.detach())

    def rounded(self, rows: Tensor, axis: int | None) -> Tensor:
        qmin, qmax = self.limits
        return mpact(rows, self.alpha, qmax) if qmin < 0 else pact(rows, self.alpha, qmax)

    def on_optimizer_step(self, latent: Tensor) -> None:
        self.alpha.data.clamp_min_(_LEAST_ALPHA)

    def must_stay_positive(self) -> Tensor | None:
        return self.alpha.detach() if self.alpha.requires_grad else None

    def describe(self) -> dict[str, Any]:
        kind = "learned" if self.alpha.requires_grad else "fixed"
        return super().describe() | {"range": f"{kind} from {self.range_name()}"}
