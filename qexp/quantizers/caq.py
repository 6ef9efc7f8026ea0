"""CAQ: int8 activations with a power of two (shift) or a linear factor (simple) per channel."""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor

from qexp.errors import QexpError
from qexp.quantizers.base import GridQuantizer
from qexp.statistics.collectors import MaxMap
from qexp.statistics.stats import TensorStats

log = logging.getLogger(__name__)
FORMULAS = ("floor127", "round128")
MEANS = ("cap", "pull", "activation_mean", "none")
BEFORE_RELU = ("positive", "all")
ZERO_CHANNELS = ("skip", "count")
_FAR = 126  # larger exponents have no float32 scale


def channel_exponents(magnitude: Tensor, bits: int = 8, formula: str = "floor127") -> Tensor:
    """Returns the exponents Q of channels with maxima `magnitude` `[G]`: codes are `round(a * 2^Q)`.

    `floor127`: `floor(log2((2^(bits-1) - 1) / m))`, without saturation. `round128`: `round(log2(2^(bits-1) / m))`, half to even; up to
    half the range saturates. The exponent of an all-zero channel is 0.

    >>> channel_exponents(torch.tensor([0, 0.5, 1, 2, 16, 90, 128, 300])).tolist()
    [0.0, 7.0, 6.0, 5.0, 2.0, 0.0, -1.0, -2.0]
    """
    magnitude = magnitude.double()
    top = 2.0 ** (bits - 1) - (formula == "floor127")
    exponent = torch.log2(top / magnitude.clamp_min(1e-300))
    exponent = exponent.floor() if formula == "floor127" else exponent.round()
    return torch.where(magnitude > 0, exponent.clamp(-_FAR, _FAR), 0.0)


def limit_exponents(exponents: Tensor, rule: str) -> Tensor:
    """Returns a layer's exponents `[G]` limited by their mean: `cap` limits from above, `pull` on the far side of zero, `none` not.

    `pull` applies two rules in sequence, as in TF2-Engine's code. First, positive exponents above the mean fall to its floor. Then negative
    exponents below the mean rise to its ceiling, including those that the first rule made negative.

    >>> limit_exponents(torch.tensor([-2.0, -1, -3]), "pull").tolist()
    [-2.0, -1.0, -2.0]
    """
    mean = exponents.mean()
    if rule == "cap":
        return torch.minimum(exponents, mean.floor())
    if rule == "pull":
        pulled = torch.where((exponents > 0) & (exponents > mean), mean.floor(), exponents)
        # the second rule acts on the result of the first: with a mean of -0.4 an exponent of 3 becomes -1, then 0
        return torch.where((pulled < 0) & (pulled < mean), mean.ceil(), pulled)
    return exponents


class CAQShift(GridQuantizer):
    """`codes = clip(round(a * 2^Q_c), -2^(bits-1), 2^(bits-1) - 1)` with one integer exponent per channel, `a^ = codes * 2^-Q_c`.

    Levels: 2^bits; fewer with the clip of `activation_mean`. Ties: half to even. Gradient: 1 within the limits (included), else 0. The
    exponents come from the observed channel maxima, limited by their mean over the layer. Saved: the scales 2^-Q_c (and the clip, as a
    real value, so that its codes follow later changes of the exponents).

    Args:
        bits: 2..16.
        shape, granularity, rounding: As for every quantizer; the method itself uses `channel`.
        exponent_formula: `floor127` or `round128`, see `channel_exponents`.
        exponent_mean: `cap`, `pull` or `none`, see `limit_exponents`; `pull` raises exponents of wide channels, which then saturate. Or
            `activation_mean`: each channel is clipped to the mean of its map of maxima, which also determines its exponent. The clip stays
            if a residual group or a refinement changes the exponents.
        before_relu: Values that count for a tensor that goes straight into a ReLU: `positive`, those that the ReLU passes, or `all` of
            |a|. `activation_mean` counts all.
        zero_channels: `skip` excludes all-zero channels from the mean and from the least exponent of a residual group; `count` includes
            them with exponent 0.

    Source: TF2-Engine's CNN Activation Quantization (no paper); `cap` as in its manual, `pull` as in its code, `activation_mean` as in one
    sentence of its description.
    Differs from the source: any width is allowed. The source counts zero channels, which loses accuracy where a shortcut pads with zeros
    and exponents are positive. It counts both signs of a convolution's result even if a ReLU follows, but a sum only after its ReLU
    (`before_relu: all`, but `positive` for additions).

    >>> from qexp.numerics import PerChannel
    >>> q = CAQShift(8, (1, 2), granularity=PerChannel(1), exponent_mean="none")
    >>> q.fit(TensorStats.of(torch.tensor([[3.0, 0.5]]), PerChannel(1)))
    >>> q.exponents.tolist(), q.codes(torch.tensor([[2.0, -0.1]])).tolist()
    ([5, 7], [[64, -13]])
    """

    sites = frozenset({"input", "output"})
    bits_allowed = (2, 16)
    needs_histogram = False

    def __init__(
        self,
        bits: int,
        shape: tuple[int, ...] = (1,),
        *,
        exponent_formula: str = "floor127",
        exponent_mean: str = "cap",
        before_relu: str = "positive",
        zero_channels: str = "skip",
        **common: Any,
    ) -> None:
        super().__init__(bits, shape, **common)
        for option, value, allowed in (
            ("exponent_formula", exponent_formula, FORMULAS),
            ("exponent_mean", exponent_mean, MEANS),
            ("before_relu", before_relu, BEFORE_RELU),
            ("zero_channels", zero_channels, ZERO_CHANNELS),
        ):
            if value not in allowed:
                raise QexpError(f"CAQShift: {option}={value!r}; allowed are {', '.join(allowed)}")
        self.exponent_formula, self.exponent_mean = exponent_formula, exponent_mean
        self.before_relu, self.zero_channels = before_relu, zero_channels
        self._counted: Tensor | None = None
        if exponent_mean == "activation_mean":
            self.collectors = (MaxMap(),)
        self.hold_scale()
        clip = torch.full_like(self.scale, 2.0 ** (bits - 1) - 1) if exponent_mean == "activation_mean" else None
        self.register_buffer("clip_value", clip)

    def fit(self, stats: TensorStats, followed_by_relu: bool = False) -> None:
        if self.exponent_mean == "activation_mean":
            magnitude = self._mean_maxima(stats)
        elif followed_by_relu and self.before_relu == "positive":
            magnitude = stats.max.clamp_min(0)
        else:
            magnitude = torch.maximum(stats.min.abs(), stats.max.abs())
        exponents = channel_exponents(magnitude, self.bits, self.exponent_formula)
        self._counted = (magnitude > 0).flatten() | (self.zero_channels == "count")
        exponents[self._counted] = limit_exponents(exponents[self._counted], self.exponent_mean)
        self.set_exponents(exponents)
        if self.clip_value is not None:
            self.put(clip_value=magnitude)
        self.mark_ready()

    def _mean_maxima(self, stats: TensorStats) -> Tensor:
        """Returns the mean of the map of maxima, of each channel or of all, `[G]`."""
        maxima = stats.extra["max_map"].double()
        return maxima.flatten(1).mean(1) if self.granularity.axis is not None else maxima.mean().reshape(1)

    @property
    def exponents(self) -> Tensor:
        """The exponents Q, int32 `[G]`."""
        return -torch.frexp(self.scale.flatten()).exponent + 1

    @property
    def counted(self) -> Tensor:
        """The channels that count in the mean and in shared exponents, bool `[G]`; all channels before `fit`."""
        return torch.ones(self.scale.numel(), dtype=torch.bool) if self._counted is None else self._counted

    def set_exponents(self, exponents: Tensor) -> None:
        """Sets the exponents `[G]`, integers; a clip keeps its real value."""
        self.put(scale=torch.exp2(-exponents.double().clamp(-_FAR, _FAR)).float())

    @property
    def limits(self) -> tuple[Any, Any]:
        low, high = -(2 ** (self.bits - 1)), 2 ** (self.bits - 1) - 1
        if self.clip_value is None:
            return low, high
        clip = torch.round(self.clip_value / self.scale)
        return (-clip).clamp_min(low), clip.clamp_max(high)

    def describe(self) -> dict[str, Any]:
        return super().describe() | {"signed": True, "range": f"{self.exponent_formula} {self.exponent_mean}"}


class CAQSimple(GridQuantizer):
    """`codes = clip(round(a * S_c), -2^(bits-1), 2^(bits-1) - 1)` with `S_c = (2^(bits-1) - 1) / max|a_c|`, `a^ = codes / S_c`.

    Levels: 2^bits. Ties: half to even. Gradient: 1 within the limits (included), else 0. An all-zero channel gets S = 1. Winograd layers
    need the form per tensor; integer hardware cannot sum the form per channel over input channels. Saved: the scales 1/S_c.

    Args:
        bits: 2..16.
        shape, granularity, rounding: As for every quantizer.
        integer_scale: Round S_c to an integer, at least 1; coarse where maxima are above about 10.

    Source: the `simple` style of TF2-Engine's CNN Activation Quantization.
    Differs from the source: real factors by default; a rounded factor is at least 1, while the source gets 0 for maxima above 254.

    >>> from qexp.numerics import PerChannel
    >>> q = CAQSimple(8, (3,), integer_scale=True, granularity=PerChannel(0))
    >>> q.fit(TensorStats.of(torch.tensor([0.5, 3.3, -20.0]), PerChannel(0)))
    >>> q.factors.tolist()
    [254.0, 38.0, 6.0]
    """

    sites = frozenset({"input", "output"})
    bits_allowed = (2, 16)
    needs_histogram = False

    def __init__(
        self,
        bits: int,
        shape: tuple[int, ...] = (1,),
        *,
        integer_scale: bool = False,
        **common: Any,
    ) -> None:
        super().__init__(bits, shape, **common)
        self.integer_scale = integer_scale
        self.hold_scale()

    def fit(self, stats: TensorStats, followed_by_relu: bool = False) -> None:
        greatest, top = torch.maximum(stats.min.abs(), stats.max.abs()), float(self.limits[1])
        if self.integer_scale:
            factor = torch.where(greatest > 0, torch.round(top / greatest.clamp_min(1e-300)), 1.0)
            if bool((factor < 1).any()):
                log.warning("%s: %d factors round to 0; 1 is used instead", self.name, int((factor < 1).sum()))
            scale = 1 / factor.clamp_min(1)
        else:
            scale = torch.where(greatest > 0, greatest / top, 1.0).clamp_min(torch.finfo(torch.float32).tiny)
        self.put(scale=scale)
        self.mark_ready()

    @property
    def factors(self) -> Tensor:
        """The factors S, float32 `[G]`."""
        factors = 1 / self.scale.flatten()
        return factors.round() if self.integer_scale else factors

    @property
    def limits(self) -> tuple[int, int]:
        return -(2 ** (self.bits - 1)), 2 ** (self.bits - 1) - 1

    def describe(self) -> dict[str, Any]:
        return super().describe() | {"signed": True, "range": "integer factor" if self.integer_scale else "minmax"}
