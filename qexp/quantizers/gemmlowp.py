"""GEMMLOWP: the affine quantizer of the ACIQ experiments."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor

from qexp.errors import QexpError
from qexp.numerics.ops import dequantize, gemmlowp, gemmlowp_codes, round_to
from qexp.quantizers.base import AffineQuantizer, fit_range
from qexp.ranges import Context, MinMax, RangeRule
from qexp.ranges.base import rule_or
from qexp.statistics.stats import TensorStats

log = logging.getLogger(__name__)
_CHOICES = {
    "zero_point": ("clamped", "unclamped"),
    "preserve_zero": (True, False, "inside"),
    "noise": ("none", "uniform"),
    "ranges": ("static", "dynamic"),
    "zero_bit": ("mean", "offset"),
}


class GEMMLOWP(AffineQuantizer):
    """`codes = round(clip(x / s + z, 0, n))`, `x^ = (codes - z) s`, with `s = (high - low) / n`, `z = round(-low / s)`, `n = 2^bits - 1`.

    Zero not preserved: `codes = round(clip((x - low) / s, 0, n))`, `x^ = codes s + low`. Levels: 2^bits. Values are clipped before they
    are rounded, and z is added before, so with half-to-even the direction of a tie depends on the parity of z. Gradient: 1 within the
    limits (included), else 0. Where a ReLU follows, a range that starts at zero includes the ReLU. A constant channel (a range without
    width) passes unchanged and is logged; a channel of 0 bits becomes a constant. Saved: scale, zero_point, the real shift of channels
    whose zero is not a code, the grid's limits (one pair per channel after bit allocation). Integers alone cannot represent
    `unclamped`, a zero that is not preserved, noise or dynamic ranges. With noise it is not idempotent, not monotone, and not within half
    a step; with dynamic ranges it is not idempotent.

    Args:
        bits, shape, granularity, rounding: See `AffineQuantizer`.
        range: Rule that picks the range.
        zero_point: `clamped` extends the range to include zero, so that z is a code; `unclamped` leaves range and z unchanged.
        preserve_zero: Whether zero has a code; `inside` only where zero lies strictly inside the range.
        pow2_scale: Round s up to a power of two.
        noise: `uniform` adds U(-1/2, 1/2) before the clip; drawn from torch's seeded generator.
        ranges: `static` from calibration, or `dynamic` from each batch.
        zero_bit: Value of a channel of 0 bits: its `mean` (after the ReLU, where one follows), or the range's `offset`.

    Source: Banner, Nahshan, Soudry 2019 (arXiv 1810.05723), their code; Jacob et al. 2018 (arXiv 1712.05877).
    Differs from the source: z is clamped by default; a constant channel also passes in the per-channel path (the source limits its scale
    to 1e-8 or more); both paths share one rounding and one rule for zero. The source's whole-tensor path is
    `zero_point: unclamped, preserve_zero: inside, rounding: half_away`.

    >>> q = GEMMLOWP(4, (6,))
    >>> x = torch.tensor([-1, -0.4, 0, 0.25, 0.55, 2])
    >>> q.fit(TensorStats.of(x))
    >>> q.codes(x).tolist(), [round(v, 4) for v in q(x).tolist()]
    ([0, 3, 5, 6, 8, 15], [-1.0, -0.4, 0.0, 0.2, 0.6, 2.0])
    """

    correctable = True
    symmetric = False

    def __init__(
        self,
        bits: int,
        shape: tuple[int, ...] = (1,),
        *,
        range: RangeRule | None = None,
        zero_point: Literal["clamped", "unclamped"] = "clamped",
        preserve_zero: Literal["inside"] | bool = True,
        pow2_scale: bool = False,
        noise: Literal["none", "uniform"] = "none",
        ranges: Literal["static", "dynamic"] = "static",
        zero_bit: Literal["mean", "offset"] = "mean",
        **common: Any,
    ) -> None:
        super().__init__(bits, shape, signed=False, **common)
        given = {"zero_point": zero_point, "preserve_zero": preserve_zero, "noise": noise, "ranges": ranges}
        for name, value in (given | {"zero_bit": zero_bit}).items():
            if value not in _CHOICES[name]:
                allowed = ", ".join(str(v).lower() for v in _CHOICES[name])
                raise QexpError(f"GEMMLOWP({name}={value!r}): allowed are {allowed}")
        if noise == "uniform" and self.rounding == "stochastic":
            raise QexpError("GEMMLOWP: noise=uniform and rounding=stochastic add noise twice; use only one of them")
        self.range, self.clamped, self.preserve_zero = rule_or(range, MinMax()), zero_point == "clamped", preserve_zero
        self.pow2_scale, self.noise, self.dynamic, self.zero_bit = pow2_scale, noise, ranges == "dynamic", zero_bit
        if noise == "uniform":
            self.properties = self.properties - {"idempotent", "monotone", "half_step"}
        if self.dynamic:
            self.properties = self.properties - {"idempotent"}
        self.hold_scale()
        self.register_buffer("shift", torch.zeros_like(self.scale))
        self.register_buffer("before_relu", torch.tensor(False))
        self._shifted = self._before_relu = False

    def fit(self, stats: TensorStats, followed_by_relu: bool = False) -> None:
        self.before_relu.fill_(followed_by_relu)
        self._before_relu = followed_by_relu
        degenerate = self._take_range(stats)
        if degenerate:
            log.info("%s: degenerate_range: %d of %d channels are constant and pass unchanged", self.name, *degenerate)
        self.mark_ready()

    def _take_range(self, stats: TensorStats) -> tuple[int, int] | None:
        """Sets scale, zero point and shift from statistics; returns the counts of constant groups and of all groups, None for none."""
        low, high = fit_range(self, self.range, stats, Context(False, self._before_relu, self.parameters_of))
        scale, zero_point = self.parameters_of(low, high)
        constant, empty = high <= low, (self._steps() == 0).expand_as(low)
        outside = ~self._preserved(low, high)
        value = self._constant(stats, low)
        shift = torch.where(empty, value, torch.where(constant | outside, low, torch.zeros_like(low))).float()
        scale = torch.where(constant | empty, torch.ones_like(scale), scale)
        zero_point = torch.where(constant | empty | outside, torch.zeros_like(zero_point), zero_point)
        self.put(scale=scale, zero_point=zero_point, shift=shift)
        self._shifted = bool((shift != 0).any())
        constant = constant & ~empty
        return (int(constant.sum()), len(low)) if bool(constant.any()) else None

    def parameters_of(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        """Returns scale and zero point, float32 `[G]`, for a range `(low, high)` `[G]`; without a code for zero, z is not an integer."""
        steps, kept = self._steps(), self._preserved(low, high)
        if self.clamped:
            low, high = torch.where(kept, low.clamp_max(0), low), torch.where(kept, high.clamp_min(0), high)
        span = high - low
        scale = torch.where((span > 0) & (steps > 0), span / steps.clamp_min(1), torch.ones_like(span))
        scale = scale.clamp_min(torch.finfo(torch.float32).tiny)
        if self.pow2_scale:
            mantissa, exponent = torch.frexp(scale)
            scale = torch.ldexp(torch.ones_like(scale), exponent - (mantissa == 0.5).to(exponent.dtype))
        scale = scale.float()
        exact = -low / scale.double()
        zero_point = round_to(exact, "half_even" if self.rounding == "stochastic" else self.rounding)
        if self.clamped:
            zero_point = torch.minimum(zero_point, steps).clamp_min(0)
        return scale, torch.where(kept, zero_point, exact).float()

    def _steps(self) -> Tensor:
        return torch.as_tensor(self.limits[1], dtype=torch.float64, device="cpu").flatten()

    def _preserved(self, low: Tensor, high: Tensor) -> Tensor:
        if self.preserve_zero == "inside":
            return (low < 0) & (high > 0)
        return torch.full_like(low, self.preserve_zero, dtype=torch.bool)

    def _constant(self, stats: TensorStats, low: Tensor) -> Tensor:
        """Returns the values of channels of 0 bits, `[G]`."""
        if self.zero_bit == "offset":
            return low
        return stats.positive_total / stats.count if self._before_relu else stats.mean

    def _call(self, function: Callable[..., Tensor], x: Tensor) -> Tensor:
        """Returns the result of `gemmlowp` or `gemmlowp_codes` in the shape of the tensor."""
        self.require_ready()
        if self.dynamic and x.numel():
            with torch.no_grad():
                self._take_range(TensorStats.of(x, self.granularity))
        rows, axis = self.rows(x)
        grid = self.scale, self.zero_point, self.shift, *self.limits
        return function(rows, *grid, axis=axis, rounding=self.rounding, noise=self.noise).reshape(x.shape)

    def forward(self, x: Tensor) -> Tensor:
        return self.corrected(self._call(gemmlowp, x if self.gain is None else x.float())).to(x.dtype)

    def codes(self, x: Tensor) -> Tensor:
        return self._call(gemmlowp_codes, x)

    def dequantize(self, codes: Tensor) -> Tensor:
        rows, _ = self.rows(codes)
        values = dequantize(rows, self.scale, self.zero_point)
        return self.corrected((values + self.shift if self._shifted else values).reshape(codes.shape))

    def describe(self) -> dict[str, Any]:
        kind = getattr(self.range, "kind", self.range_name())
        return super().describe() | {"range": f"{kind}, dynamic" if self.dynamic else kind}

    def _load_from_state_dict(self, *args: Any) -> None:
        super()._load_from_state_dict(*args)
        self._shifted, self._before_relu = bool((self.shift != 0).any()), bool(self.before_relu)
