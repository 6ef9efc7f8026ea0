"""DoReFa: tanh-normalised weights and activations clipped to [0, 1]."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from qexp.errors import QexpError
from qexp.numerics.ops import dorefa_weight_and_peak, round_to
from qexp.quantizers.base import AffineQuantizer, Quantizer, fit_range
from qexp.ranges import Context, RangeRule
from qexp.statistics.stats import TensorStats


class DoReFaWeight(Quantizer):
    """`t = tanh(w) / max|tanh(w)|`, then `2 round((t/2 + 1/2) n)/n - 1` (original) or `round(t m)/m` (symmetric).

    Levels: original 2^bits in [-1, 1] without zero (n = 2^bits - 1; w = 0 becomes the smallest positive level); symmetric 2^bits - 1
    including zero (m = 2^(bits-1) - 1), ternary at 2 bits. At 1 bit both are `sign(w) * E|w|`, with sign(0) = +1. Gradient: through tanh
    and the maximum, straight through the rounding; at 1 bit straight to w. Not idempotent and without an error bound of half a step,
    because tanh changes its own result. No calibration: the maximum is computed from the tensor. The magnitude of the layer is lost, so a
    batch norm must follow, unless `rescale: max`. Saved: only that scale.

    Args:
        bits, shape, granularity, rounding: See `Quantizer`; one maximum per tensor, half to even.
        variant: `original` or `symmetric`.
        rescale: `none`, or `max`: multiply the result by `max|tanh(w)|`, which restores the magnitude.

    Source: Zhou et al. 2016 (arXiv 1606.06160), equations 7-9; the symmetric form as PACT-Quantization uses it.
    Differs from the paper: symmetric is ternary at 2 bits (PACT-Quantization computes a sign function there, and NaN at 1 bit).

    >>> q = DoReFaWeight(4, (4,))
    >>> [round(v, 4) for v in q(torch.tensor([-1.5, -0.2, 0.0, 0.9])).tolist()]
    [-1.0, -0.2, 0.0667, 0.7333]
    """

    properties = frozenset({"monotone"})
    sites = frozenset({"weight"})
    granularities = ("tensor",)
    roundings = ("half_even",)

    def __init__(
        self,
        bits: int,
        shape: tuple[int, ...] = (1,),
        *,
        variant: Literal["original", "symmetric"] = "original",
        rescale: Literal["none", "max"] = "none",
        **common: Any,
    ) -> None:
        super().__init__(bits, shape, **common)
        if variant not in ("original", "symmetric") or rescale not in ("none", "max"):
            raise QexpError(
                f"DoReFaWeight(variant={variant!r}, rescale={rescale!r}): allowed are original|symmetric and none|max"
            )
        self.variant, self.rescale = variant, rescale
        self.register_buffer("magnitude", torch.ones(()))  # real value of one unit of the normalised weight

    @property
    def _symmetric(self) -> bool:
        return self.variant == "symmetric" and self.bits > 1

    @property
    def _steps(self) -> int:
        return 2 ** (self.bits - 1) - 1 if self._symmetric else 2**self.bits - 1

    @property
    def limits(self) -> tuple[int, int]:
        return (-self._steps, self._steps) if self._symmetric else (0, self._steps)

    @property
    def scale(self) -> Tensor:
        return self.magnitude * (1 if self._symmetric else 2) / self._steps

    @property
    def zero_point(self) -> Tensor:
        """The code of zero; for the original form, which has no zero, half-way between two codes."""
        return torch.full_like(self.magnitude, 0.0 if self._symmetric else self._steps / 2)

    def forward(self, x: Tensor) -> Tensor:
        if self.bits == 1:
            self._measure(x)
            w = x.float()
            binary = torch.where(w >= 0, self.magnitude, -self.magnitude)
            # exact, since the difference is zero: `w + (binary - w)` would round
            return (binary + (w - w.detach()) if w.requires_grad else binary).to(x.dtype)
        rescale = self.rescale == "max"
        y, peak = dorefa_weight_and_peak(x.float(), self._steps, self._symmetric, rescale=rescale)
        if rescale and x.numel():
            self.magnitude.copy_(peak)
        return y.to(x.dtype)

    def codes(self, x: Tensor) -> Tensor:
        self._measure(x)
        w = x.detach().float()
        if self.bits == 1:
            return (w >= 0).int()
        t = torch.tanh(w)
        peak = t.abs().max() if t.numel() else self.magnitude
        t = t / torch.where(peak == 0, 1.0, peak)
        return round_to(t * self._steps if self._symmetric else (t / 2 + 0.5) * self._steps, "half_even").int()

    def dequantize(self, codes: Tensor) -> Tensor:
        codes = codes.float()
        y = codes / self._steps if self._symmetric else 2 * (codes / self._steps) - 1
        return y if self.bits > 1 and self.rescale == "none" else y * self.magnitude

    @torch.no_grad()
    def _measure(self, w: Tensor) -> None:
        w = w.float()
        if w.numel() == 0:
            return
        if self.bits == 1:
            self.magnitude.copy_(w.abs().mean())
        elif self.rescale == "max":
            self.magnitude.copy_(torch.tanh(w).abs().max())

    def describe(self) -> dict[str, Any]:
        return super().describe() | {"signed": True, "range": "tanh"}


class DoReFaInput(AffineQuantizer):
    """`round(clip(k x, 0, 1) n) / n`: the activation is multiplied by k and clipped to the unit interval.

    Levels: 2^bits. Gradient: k inside the clip, 0 outside (1 inside with `unscale`). Saved: k, the grid's limits.

    Args:
        bits, shape, granularity, rounding: See `AffineQuantizer`; one k per tensor.
        range: The scale k (1 in the paper, 0.1 in PACT-Quantization), or a range rule, which gives k = 1 / (upper end of its range).
        unscale: Divide by k afterwards, so that the tensor keeps its magnitude.
        signed: False as published; True or `auto` (if the tensor has negative values) clips to [-1, 1] with `2^(bits-1) - 1` steps per
            side.

    Source: Zhou et al. 2016 (arXiv 1606.06160), equation 11.
    Differs from the paper: `unscale`, and the two-sided form for tensors without a ReLU before them, which the paper does not cover.

    >>> q = DoReFaInput(4, (3,), range=1.0, unscale=False)
    >>> q.fit(TensorStats.of(torch.tensor([0.0, 1.7])))
    >>> [round(v, 4) for v in q(torch.tensor([0.4, 0.65, 1.7])).tolist()]
    [0.4, 0.6667, 1.0]
    """

    sites = frozenset({"input", "output"})
    granularities = ("tensor",)

    def __init__(
        self,
        bits: int,
        shape: tuple[int, ...] = (1,),
        *,
        signed: bool | Literal["auto"] = "auto",
        range: float | RangeRule = 1.0,
        unscale: bool = True,
        **common: Any,
    ) -> None:
        super().__init__(bits, shape, signed=signed, narrow=True, **common)
        number = isinstance(range, float | int)
        if number and not range > 0:
            raise QexpError(f"DoReFaInput: range={range} is not allowed; use a positive number or a range rule")
        self.range, self.unscale = range, unscale
        self.properties = self.properties if unscale else self.properties - {"idempotent", "half_step"}
        self.register_buffer("k", torch.tensor(float(range) if number else 1.0))

    def fit(self, stats: TensorStats, followed_by_relu: bool = False) -> None:
        self.follow_sign(stats, followed_by_relu)
        if not isinstance(self.range, float | int):
            _, high = fit_range(self, self.range, stats, Context(True, followed_by_relu, self._parameters_of))
            self.k.fill_(1.0 / max(float(high.max()), 1e-6))
        self.mark_ready()

    def _parameters_of(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        scale = high / self.limits[1]
        return torch.where(scale > 0, scale, torch.ones_like(scale)), torch.zeros_like(scale)

    @property
    def scale(self) -> Tensor:
        """Real value of one code of the quantizer's result, `[]`."""
        return self._step / self.k if self.unscale else self._step

    @property
    def zero_point(self) -> Tensor:
        return torch.zeros_like(self.k)

    @property
    def _step(self) -> Tensor:
        return torch.ones_like(self.k) / self.limits[1]

    def prepared(self, x: Tensor) -> tuple[Tensor, int | None]:
        self.require_ready()
        return (x if self.unscale else x.float() * self.k), None

    def describe(self) -> dict[str, Any]:
        return super().describe() | {"range": f"k from {self.range_name()}"}
