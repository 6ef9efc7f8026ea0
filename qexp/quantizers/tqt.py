"""TQT: the logarithm of the clipping threshold is learned, and the step is always a power of two."""

from __future__ import annotations

import math
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from qexp.numerics.ops import lsq
from qexp.quantizers.base import AffineQuantizer, fit_range, usual_magnitude
from qexp.ranges import MSE, Context, RangeRule
from qexp.ranges.base import rule_or
from qexp.statistics.stats import TensorStats

_REACH = 100.0  # limit of |log2 t|, so that the step is a normal float32
_DECAY = 0.999  # decay of the running mean of squared gradients


class TQT(AffineQuantizer):
    """`x^ = clip(round(x / s), qmin, qmax) * s`, `s = 2^ceil(log2 t) / 2^(bits-1)` (unsigned: `2^bits`), with log2 t learned.

    Levels: 2^bits; the step is always a power of two. Gradients: to x, 1 where `qmin <= round(x/s) <= qmax`; to log2 t,
    `s ln 2` times `round(x/s) - x/s` there and the limit elsewhere, straight through the ceiling. The value is rounded before it is
    clipped, as published: gradients pass half a step beyond the limits (a tie at that edge counts as outside). Saved: log2 t, the
    grid's limits, the running mean of its squared gradients.

    Args:
        bits, shape, granularity, rounding, signed: See `AffineQuantizer`; half_even only.
        range: Range rule; the end of greater magnitude is the first threshold.
        normed: Divide the gradient of log2 t by the root of its running mean square and pass it through tanh, so that a step's length
            depends neither on the width nor on the size of the tensor. With plain SGD the published raw gradient does.

    Source: Jain et al. 2019 (arXiv 1903.08066), equations 4-8; the normed gradient from appendix B.
    Differs from the paper: the threshold starts at the logarithmic middle of the two powers of two around it, since a rule that tries only
    powers of two gives no finer value; the normed gradient replaces Adam.

    >>> from qexp.ranges import MinMax
    >>> q = TQT(3, (4,), signed=True, range=MinMax())
    >>> q.fit(TensorStats.of(torch.tensor([-0.7, 0.2, 0.4, 0.65])))
    >>> q.scale.item(), q.codes(torch.tensor([-0.7, 0.2, 0.4, 0.65])).tolist()
    (0.25, [-3, 1, 2, 3])
    """

    roundings = ("half_even",)

    def __init__(
        self,
        bits: int,
        shape: tuple[int, ...] = (1,),
        *,
        signed: bool | Literal["auto"] = "auto",
        range: RangeRule | None = None,
        normed: bool = True,
        **common: Any,
    ) -> None:
        super().__init__(bits, shape, signed=signed, **common)
        self.range, self.normed = rule_or(range, MSE()), normed
        self.log2_t = nn.Parameter(torch.zeros(self.granularity.scale_shape(self.shape)))
        self.register_buffer("square", torch.zeros_like(self.log2_t))
        self.register_buffer("seen", torch.zeros(()))

    def fit(self, stats: TensorStats, followed_by_relu: bool = False) -> None:
        self.choose_sign(stats)
        low, high = fit_range(self, self.range, stats, Context(True, followed_by_relu, self._parameters_of))
        reach = torch.maximum(-low, high)
        # a range of zeros starts like the other channels, or at three standard deviations of a freshly initialised tensor
        alive = reach > 0
        fresh = torch.tensor(3 * math.sqrt(math.pi / 2) * usual_magnitude(self.shape), dtype=reach.dtype)
        exponent = _exponent(torch.where(alive, reach, reach[alive].median() if bool(alive.any()) else fresh))
        with torch.no_grad():
            self.log2_t.copy_((exponent - 0.5).reshape(self.log2_t.shape))
            self.square.zero_()
            self.seen.zero_()
        self.mark_ready()

    def range_key(self) -> tuple[()]:
        return ()

    def _parameters_of(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        scale = torch.exp2(_exponent(torch.maximum(-low, high)) - self._fraction_bits)
        return scale, torch.zeros_like(scale)

    @property
    def _fraction_bits(self) -> int:
        """The number of powers of two between the step and the threshold."""
        return self.bits - 1 if self.limits[0] < 0 else self.bits

    @property
    def scale(self) -> Tensor:
        """The step, a power of two, in the shape that broadcasts against the tensor."""
        return torch.exp2((torch.ceil(self.log2_t.detach()) - self._fraction_bits).double()).float()

    @property
    def zero_point(self) -> Tensor:
        return torch.zeros_like(self.log2_t.detach())

    @property
    def edges(self) -> tuple[float, float]:
        """Limits for which *clip, then round* equals *round, then clip*: the last numbers that still round into the grid."""
        qmin, qmax = (np.float32(q) for q in self.limits)
        half, infinity = np.float32(0.5), np.float32(np.inf)
        return float(np.nextafter(qmin - half, infinity)), float(np.nextafter(qmax + half, -infinity))

    def rounded(self, rows: Tensor, axis: int | None) -> Tensor:
        memory = (self.square, self.seen) if self.normed and self.training else None
        return lsq(rows, _Step.apply(self.log2_t, self._fraction_bits, memory), *self.edges, axis=axis)

    def on_optimizer_step(self, latent: Tensor | None) -> None:
        self.log2_t.data.clamp_(-_REACH, _REACH)  # NaN stays NaN

    def must_stay_positive(self) -> Tensor:
        return _REACH - self.log2_t.detach().abs()

    def describe(self) -> dict[str, Any]:
        return super().describe() | {"range": f"learned power of two from {self.range_name()}"}


def _exponent(threshold: Tensor) -> Tensor:
    """Returns `ceil(log2 t)`, float64, exactly; 0 for a threshold of 0."""
    mantissa, exponent = torch.frexp(threshold.double())
    exponent = exponent - (mantissa == 0.5).to(exponent.dtype)
    return torch.where(threshold > 0, exponent, 0).double().clamp(-_REACH + 1, _REACH)


class _Step(torch.autograd.Function):
    """`2^(ceil(log2 t) - fraction_bits)`; its gradient is `s ln 2`, normed if a memory `(mean square, steps)` is given."""

    @staticmethod
    def forward(ctx: Any, log2_t: Tensor, fraction_bits: int, memory: tuple[Tensor, Tensor] | None) -> Tensor:
        scale = torch.exp2((torch.ceil(log2_t) - fraction_bits).double()).float()
        ctx.scale, ctx.memory = scale, memory
        return scale

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        grad = grad * ctx.scale * math.log(2)
        if ctx.memory is not None:
            square, seen = ctx.memory
            seen += 1
            square.mul_(_DECAY).add_(grad.square(), alpha=1 - _DECAY)
            root = (square / (1 - _DECAY**seen)).sqrt()
            grad = torch.where(root > 0, torch.tanh(grad / root), grad)
        return grad, None, None
