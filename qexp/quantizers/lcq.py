"""LCQ: a learned piecewise linear curve is applied before uniform rounding and inverted after it, so that the levels are learned."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn

from qexp.errors import QexpError
from qexp.quantizers.base import AffineQuantizer, fit_range
from qexp.ranges import MSE, Context, RangeRule
from qexp.ranges.base import rule_or
from qexp.statistics.stats import TensorStats

_LEAST_ALPHA = 1e-8
_LEAST_STD = 1e-12
_LEAST_SHARE = 1e-3  # least rise of a piece, as a share of an even piece; a flat piece would divide by zero


class _Companded(torch.autograd.Function):
    """The given values; the gradients of `LCQ` to x, alpha, the slopes and the heights of the curve."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, values: Tensor, alpha: Tensor, slopes: Tensor, heights: Tensor, n: int) -> Tensor:
        ctx.save_for_backward(x, values, alpha, slopes, heights)
        ctx.n = n
        return values.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, values, alpha, slopes, heights = ctx.saved_tensors
        v = x.abs() / alpha
        inside = v < 1
        dx = grad * inside
        dalpha = (grad * (values / alpha - torch.sign(x) * v * inside)).sum().reshape(alpha.shape)
        # Outside, both are 0 and add nothing. Leaving those elements out would make the host wait for their number.
        h = torch.where(inside, grad * torch.sign(x) * alpha, 0).flatten()
        v = torch.where(inside, v, 0).flatten()
        pieces = len(slopes)
        k = (v * pieces).long().clamp_max(pieces - 1)
        rounded = torch.round(ctx.n * compressed(v, slopes, heights, k)) / ctx.n
        j = piece_of(rounded, heights)
        h = h / slopes[j]

        def gathered(index: Tensor, weights: Tensor) -> Tensor:
            return torch.zeros_like(slopes).index_add_(0, index, weights)

        dslopes = gathered(k, h * (v - k / pieces)) - gathered(j, h * (rounded - heights[j]) / slopes[j])
        dheights = gathered(k, h) - gathered(j, h)
        return dx, None, dalpha, dslopes, dheights, None


def compressed(v: Tensor, slopes: Tensor, heights: Tensor, k: Tensor) -> Tensor:
    """Returns y in 0..1 of v in 0..1 that lies in piece k of the curve."""
    return slopes[k] * (v - k / len(slopes)) + heights[k]


def piece_of(y: Tensor, heights: Tensor) -> Tensor:
    """Returns the piece of the curve whose heights y lies between."""
    return (torch.searchsorted(heights, y.contiguous(), right=True) - 1).clamp(0, len(heights) - 1)


class LCQ(AffineQuantizer):
    """`x^ = sign(x) alpha z` with `z = expand(round(n compress(|x| / alpha)) / n)`; alpha and the curve are learned.

    The curve has K pieces of equal width on 0..1; piece k rises by `p_k = softmax(theta)_k`, so that its slope is `K p_k` and its height
    `sum_{j<k} p_j`; `expand` is its inverse. Levels: n on each side of zero and zero, with `n = 2^(bits-1) - 1` where signed; 0..n with
    `n = 2^bits - 1` where not; unevenly spaced; ties of the compressed value to even. Beyond alpha the value is alpha. Gradients: `dx = g`
    where `|x| < alpha`; `dalpha = sum g sign(x) (z - v 1[v < 1])` with `v = |x|/alpha`; theta gets the gradient of the curve and of its
    inverse, straight through the rounding. theta starts at 0 (a uniform quantizer), alpha from a range rule. Not idempotent (a rounded
    table moves levels off the curve), and no error bound of half a step, since steps differ. Saved: alpha, theta, the grid's limits.

    Args:
        bits, shape, granularity, rounding, signed: See `AffineQuantizer`; one curve per tensor.
        range: Range rule for the first alpha; None means `MSE`.
        pieces: Number K of pieces.
        normalize: For weights: `(w - mean) / std` is quantized and multiplied by std; the mean is not put back.
        table_bits: Bits of the levels, so that integers can represent them; None leaves the levels real.

    Source: Yamamoto 2021, "Learnable companding quantization" (arXiv 2103.07156), sections 3.2 and 3.3.
    Differs from the paper: `dx` is the plain straight-through gradient; each piece rises by at least a thousandth of an even one, since a
    flat piece cannot be inverted.

    >>> q = LCQ(3, (5,), signed=False)
    >>> q.fit(TensorStats.of(torch.linspace(0, 1, 100)))
    >>> q.codes(torch.tensor([0.0, 0.3, 2.0])).int().tolist()
    [0, 2, 7]
    """

    properties = frozenset({"monotone", "needs_calibration"})
    sites = frozenset({"input", "weight", "output"})
    bits_allowed = (1, 8)
    granularities = ("tensor",)
    roundings = ("half_even",)

    def __init__(
        self,
        bits: int,
        shape: tuple[int, ...] = (1,),
        *,
        signed: bool | Literal["auto"] = "auto",
        range: RangeRule | None = None,
        pieces: int = 16,
        normalize: bool = False,
        table_bits: int | None = None,
        **common: Any,
    ) -> None:
        super().__init__(bits, shape, signed=signed, narrow=True, **common)
        if isinstance(pieces, bool) or not (isinstance(pieces, int) and pieces >= 1):
            raise QexpError(f"LCQ: pieces={pieces!r} is not allowed; use a whole number from 1 on, such as 16")
        if table_bits is not None and not (isinstance(table_bits, int) and bits <= table_bits <= 16):
            raise QexpError(f"LCQ: table_bits={table_bits!r} is not allowed; use {bits}..16, or null")
        self.range, self.pieces, self.normalize, self.table_bits = rule_or(range, MSE()), pieces, normalize, table_bits
        self.alpha, self.theta = nn.Parameter(torch.ones(1)), nn.Parameter(torch.zeros(pieces))
        self.register_buffer("deviation", torch.ones(1), persistent=False)  # of the weight as last seen

    def fit(self, stats: TensorStats, followed_by_relu: bool = False) -> None:
        self.choose_sign(stats)
        low, high = fit_range(self, self.range, stats, Context(True, followed_by_relu, self._parameters_of))
        if self.normalize:
            low, high = low.clamp_min(stats.min) - stats.mean, high.clamp_max(stats.max) - stats.mean
            self.deviation.copy_(_deviation(stats).clamp_min(_LEAST_STD))
            low, high = low / self.deviation, high / self.deviation
        alpha = torch.maximum(high, -low if self.limits[0] else high).float().reshape(1)
        with torch.no_grad():
            self.alpha.copy_(torch.where(alpha > _LEAST_ALPHA, alpha, torch.ones_like(alpha)))
        self.mark_ready()

    def _parameters_of(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        qmin, qmax = self.limits
        reach = torch.maximum(high, -low) if qmin else high
        scale = reach / qmax
        return scale, torch.zeros_like(scale)

    def range_key(self) -> tuple[()]:
        return ()

    def curve(self) -> tuple[Tensor, Tensor]:
        """Returns slopes and heights `[K]` of the pieces, with gradients to theta."""
        rises = torch.softmax(self.theta, 0).clamp_min(_LEAST_SHARE / self.pieces)
        rises = rises / rises.sum()
        return self.pieces * rises, torch.cumsum(rises, 0) - rises

    def table(self) -> Tensor:
        """Returns the levels 0..1 of the codes 0..n, in shares of alpha."""
        n = self.limits[1]
        slopes, heights = (t.detach() for t in self.curve())
        y = torch.arange(n + 1, device=slopes.device, dtype=torch.float32) / n
        j = piece_of(y, heights)
        z = (y - heights[j]) / slopes[j] + j / self.pieces
        z[-1] = 1
        if self.table_bits is not None:
            finest = 2 ** (self.table_bits - 1) - 1 if self.limits[0] else 2**self.table_bits - 1
            z = torch.round(z * finest) / finest
        return z

    @property
    def scale(self) -> Tensor:
        """Alpha divided by n: the mean distance of two levels."""
        return self.alpha.detach() * self._unit() / self.limits[1]

    @property
    def zero_point(self) -> Tensor:
        return torch.zeros_like(self.alpha.detach())

    def _unit(self) -> Tensor | float:
        return self.deviation if self.normalize else 1.0

    def _standardised(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Returns the values to quantize, float32, and the factor that multiplies the result."""
        x = x.float()
        if not self.normalize:
            return x, None
        flat = x.contiguous().reshape(-1)
        std = flat.std(correction=min(1, flat.numel() - 1)).clamp_min(_LEAST_STD)
        self.deviation.copy_(std.detach())
        return (x - flat.mean()) / std, std

    def _codes(self, x: Tensor) -> Tensor:
        slopes, heights = (t.detach() for t in self.curve())
        v = (x.abs() / self.alpha.detach()).clamp_max(1)
        k = (v * self.pieces).long().clamp_max(self.pieces - 1)
        n = self.limits[1]
        magnitude = torch.where(v < 1, torch.round(n * compressed(v, slopes, heights, k)), float(n))
        signs = torch.sign(x) if self.limits[0] else (x > 0).float()
        return signs * magnitude

    def _values(self, codes: Tensor) -> Tensor:
        return torch.sign(codes) * self.alpha.detach() * self.table()[codes.abs().long()]

    def forward(self, x: Tensor) -> Tensor:
        self.require_ready()
        u, std = self._standardised(x)
        values = self._values(self._codes(u.detach()))
        if not self.limits[0]:
            u = u * (u > 0)  # an unsigned tensor: values below zero become zero, without a gradient
        y = _Companded.apply(u, values, self.alpha, *self.curve(), self.limits[1])
        return (y if std is None else y * std).to(x.dtype)

    @torch.no_grad()
    def codes(self, x: Tensor) -> Tensor:
        self.require_ready()
        return self._codes(self._standardised(x)[0])

    @torch.no_grad()
    def dequantize(self, codes: Tensor) -> Tensor:
        values = self._values(codes)
        return values * self.deviation if self.normalize else values

    @torch.no_grad()
    def on_optimizer_step(self, latent: Tensor | None) -> None:
        self.alpha.clamp_min_(_LEAST_ALPHA)

    def must_stay_positive(self) -> Tensor:
        return self.alpha.detach()

    def describe(self) -> dict[str, Any]:
        return super().describe() | {"range": f"learned curve of {self.pieces} pieces"}


def _deviation(stats: TensorStats) -> Tensor:
    """Returns the unbiased standard deviation of a tensor, float64 `[1]`."""
    n = stats.count
    return (stats.squares - n * stats.mean.square()).clamp_min(0).div((n - 1).clamp_min(1)).sqrt()
