"""Mid-tread: a number of bins per channel instead of bits, for tensors that are stored with a variable-length code."""

from __future__ import annotations

from typing import Any, Literal

import torch
from scipy.special import lambertw
from torch import Tensor

from qexp.errors import QexpError
from qexp.numerics.bins import bins
from qexp.numerics.ops import round_to
from qexp.quantizers.base import GridQuantizer
from qexp.statistics.stats import TensorStats

_EXACT_CODES = 2.0**23  # float32 cannot distinguish larger neighbouring codes


def clip_over_b(omega: Tensor) -> Tensor:
    """Returns `W0(3 omega^2)`, float64: the best clip of a Laplace tensor, divided by b, if `omega` bins fill the range.

    >>> [round(k, 8) for k in clip_over_b(torch.tensor([1.0, 4.0, 16.0])).tolist()]
    [1.04990889, 2.83068299, 5.02864014]
    """
    return torch.from_numpy(lambertw(3 * omega.double().numpy() ** 2).real)


class MidTread(GridQuantizer):
    """`codes = clip(round(x / delta), lo, hi)`, `x^ = codes * delta`, each channel with omega bins of width delta in its range.

    omega is the channel's share of `C * 2^target` bins, rounded to even on ties. The range is `2 k b` around the mean. Where a ReLU
    follows or all values are non-negative, it is `max(mean, 0) + k b` above zero. Here `k = W0(3 omega^2)` (`W0(3 (2 omega)^2)`) and
    `b = E|x - E x|`; without clipping the range is `max - min`. Levels: an even omega has omega + 1 (2^bits + 1 where all channels are
    equal). A channel of 0 bins becomes 0; a constant channel passes unchanged. Gradient: 1 within the limits (included), else 0. No bits
    are allocated: the rate is the entropy of the codes, which the record holds. Saved: delta, the limits. With `bounds: legacy` the limits
    are not integers, so clipped values lie off the grid and are neither idempotent nor within half a step.

    Args:
        bits, shape, granularity, rounding: See `Quantizer`.
        target: log2 of the mean number of bins per channel if that is not a whole number, such as 5.3; the default is bits.
        clip: False distributes the bins over all of `max - min`, as the source does for weights.
        prior: Measure for the shares: `gauss` uses the standard deviation, `laplace` uses b.
        bounds: `integer`, or `legacy` as in the source: `mean / delta -+ omega / 2`, and `max(mean, 0) / delta + omega` above zero,
            not rounded.

    Source: the mid-tread quantizer of cnn-quantization; Banner et al. 2019 (arXiv 1810.05723) for shares and clips.
    Differs from the source: integer bounds; k from Lambert's W, not from a table; a step keeps all codes below 2^23.

    >>> x = torch.tensor([-2.1, -0.9, -0.4, -0.1, 0, 0.2, 0.5, 0.8, 1.6, 3])
    >>> q = MidTread(3, (10,), target=2.584962500721156)
    >>> q.fit(TensorStats.of(x))
    >>> round(q.scale.item(), 5), q.codes(x).tolist()
    (1.11623, [-2, -1, 0, 0, 0, 0, 0, 1, 1, 3])
    """

    sites = frozenset({"input", "weight", "output"})
    level_counts = (1,)
    needs_histogram = False

    def __init__(
        self,
        bits: int,
        shape: tuple[int, ...] = (1,),
        *,
        target: float | None = None,
        clip: bool = True,
        prior: Literal["gauss", "laplace"] = "gauss",
        bounds: Literal["integer", "legacy"] = "integer",
        **common: Any,
    ) -> None:
        super().__init__(bits, shape, **common)
        if prior not in ("gauss", "laplace") or bounds not in ("integer", "legacy"):
            raise QexpError(
                f"MidTread(prior={prior!r}, bounds={bounds!r}): allowed are gauss|laplace and integer|legacy"
            )
        if target is not None and not 0 < target <= self.bits_allowed[1]:
            raise QexpError(f"MidTread(target={target}): allowed is above 0 and up to {self.bits_allowed[1]}")
        self.target, self.clip, self.prior, self.legacy = target, clip, prior, bounds == "legacy"
        if self.legacy:
            self.properties = self.properties - {"idempotent", "half_step"}
        for name in ("scale", "qmin", "qmax"):
            self.register_buffer(name, torch.full(self.granularity.scale_shape(self.shape), float(name == "scale")))
        self._limits: tuple[float, float] | None = (0, 0)

    def fit(self, stats: TensorStats, followed_by_relu: bool = False) -> None:
        spread = stats.std if self.prior == "gauss" else stats.b
        omega = bins(spread, self.bits if self.target is None else self.target).round()
        half = followed_by_relu or bool((stats.min >= 0).all())
        delta = self._width(stats, omega, half) / omega.clamp_min(1)
        magnitude = torch.maximum(stats.min.abs(), stats.max.abs())
        constant = stats.min == stats.max
        delta = torch.where((delta > 0) & ~constant, delta, magnitude)  # the value of a constant channel is one step
        delta = torch.maximum(delta, magnitude / _EXACT_CODES).clamp_min(torch.finfo(torch.float32).tiny)
        delta = torch.where((omega == 0) | (magnitude == 0), 1.0, delta).float().double()
        low, high = self._bounds(stats, omega, half, delta)
        for name, found in (("scale", delta), ("qmin", low), ("qmax", high)):
            getattr(self, name).copy_(
                torch.where((omega == 0) & (name != "scale"), 0.0, found).reshape(self.scale.shape)
            )
        self._note_limits()
        self.mark_ready()

    def _width(self, stats: TensorStats, omega: Tensor, half: bool) -> Tensor:
        if not self.clip:
            return stats.max - stats.min
        if half:
            return stats.mean.clamp_min(0) + clip_over_b(2 * omega) * stats.b
        return 2 * clip_over_b(omega) * stats.b

    def _bounds(self, stats: TensorStats, omega: Tensor, half: bool, delta: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the least and greatest code, float64 `[G]`."""
        middle = stats.mean / delta
        if not self.clip:
            low, high = stats.min / delta, stats.max / delta
        elif half:
            low, high = torch.zeros_like(omega), middle.clamp_min(0) + omega if self.legacy else omega
        else:
            low, high = middle - omega / 2, middle + omega / 2
        constant = stats.min == stats.max
        low, high = (torch.where(constant, (stats.mean / delta).round(), end) for end in (low, high))
        return (low, high) if self.legacy and self.clip else (low.round(), high.round())

    def _note_limits(self) -> None:
        """Stores limits that all channels share as host numbers, to avoid synchronising with the device."""
        ends = [float(self.qmin.min()), float(self.qmin.max()), float(self.qmax.min()), float(self.qmax.max())]
        self._limits = (ends[0], ends[2]) if ends[0] == ends[1] and ends[2] == ends[3] else None

    @property
    def limits(self) -> tuple[Any, Any]:
        return self._limits if self._limits is not None else (self.qmin, self.qmax)

    @property
    def zero_point(self) -> Tensor:
        return torch.zeros_like(self.scale)

    def rounded(self, rows: Tensor, axis: int | None) -> Tensor:
        if not self.legacy:
            return super().rounded(rows, axis)
        v = rows.detach().float() / self.scale
        inside = (v >= self.qmin) & (v <= self.qmax)
        return self.level(self._clipped(v)) + (rows - rows.detach()) * inside

    def codes(self, x: Tensor) -> Tensor:
        if not self.legacy:
            return super().codes(x)
        rows, _ = self.prepared(x.detach().float())
        return self._clipped(rows / self.scale).reshape(x.shape)

    def _clipped(self, v: Tensor) -> Tensor:
        """Returns codes that are first rounded, then clipped to limits that are not integers."""
        return torch.maximum(torch.minimum(round_to(v, self.rounding), self.qmax), self.qmin)

    def describe(self) -> dict[str, Any]:
        return super().describe() | {"range": "bins" if self.clip else "bins, unclipped"}

    def _load_from_state_dict(self, *args: Any) -> None:
        super()._load_from_state_dict(*args)
        self._note_limits()
