"""APoT: levels that are sums of powers of two, dense around zero, scaled by a learned clip."""

from __future__ import annotations

import itertools
import logging
import math
from typing import Any, Literal

import torch
from qexp_kernels import level_grid
from torch import Tensor, nn

from qexp.errors import QexpError
from qexp.numerics.grid import UniformGrid
from qexp.quantizers.base import AffineQuantizer, usual_magnitude
from qexp.statistics.stats import TensorStats

log = logging.getLogger(__name__)

_LEAST_ALPHA = 1e-3
_CANDIDATES = 100  # clips tried by `mse`, evenly spaced up to the greatest magnitude
# exponents of the additive terms, by magnitude bits; each set also holds 0
_TERMS: dict[int, tuple[tuple[int, ...], ...]] = {
    1: ((0,),),
    2: ((-1, -2, -3),),
    3: ((-1, -2, -4), (-3,)),
    4: ((-1, -3, -5), (-2, -4, -6)),
    5: ((-1, -3, -6), (-2, -4, -7), (-5,)),
    6: ((-1, -4, -7), (-2, -5, -8), (-3, -6, -9)),
}


def magnitudes(bits: int, additive: bool = True) -> list[float]:
    """Returns the 2^bits levels between 0 and 1, ascending: sums of one term from each set, divided by the largest sum.

    Args:
        bits: Bits of the magnitude, 1..6.
        additive: False gives plain powers of two, `0, 2^-(2^bits - 2), ..., 1/2, 1`.

    >>> magnitudes(3)
    [0.0, 0.1, 0.2, 0.3, 0.4, 0.6, 0.8, 1.0]
    """
    if not additive:
        return [0.0, *(2.0**-e for e in reversed(range(2**bits - 1)))]
    sums = sorted(sum(terms) for terms in itertools.product(*((0.0, *(2.0**e for e in part)) for part in _TERMS[bits])))
    return [s / sums[-1] for s in sums]


class _APoT(AffineQuantizer):
    """Common base of APoT's weights and activations: the levels, their codes (signed indices) and the learned clip."""

    properties = frozenset({"idempotent", "monotone", "needs_calibration"})
    granularities = ("tensor",)
    roundings = ("half_even",)
    normalize = False

    def __init__(
        self,
        bits: int,
        shape: tuple[int, ...],
        *,
        signed: bool | Literal["auto"],
        range: Literal["mse"] | float,
        additive: bool,
        **common: Any,
    ) -> None:
        super().__init__(bits, shape, signed=signed, narrow=True, **common)
        number = isinstance(range, float | int) and not isinstance(range, bool)
        if range != "mse" and not (number and range > 0):
            raise QexpError(f"{type(self).__name__}: range={range!r}; allowed are mse or a positive number")
        self.range, self.additive = range, additive
        self._make_levels()
        self.alpha = nn.Parameter(torch.ones(()))

    def set_grid(self, grid: UniformGrid) -> None:
        super().set_grid(grid)
        self._make_levels()

    def _make_levels(self) -> None:
        qmin, _ = self.limits
        positive = magnitudes(self.bits - int(qmin < 0), self.additive)
        values = [-v for v in reversed(positive[1:])] + positive if qmin < 0 else positive
        self.register_buffer("unit_levels", torch.tensor(values, device=self.qmin.device), persistent=False)

    def start(self, stats: TensorStats, mean: Tensor | float = 0.0, spread: Tensor | float = 1.0) -> None:
        """Sets the first clip, for values `(x - mean) / spread`: the number in `range`, or the clip with the least squared error."""
        alpha = self.range
        if alpha == "mse":
            peak = float((torch.maximum((stats.min - mean).abs(), (stats.max - mean).abs()) / spread).max())
            levels = self.unit_levels.double().cpu()[None]
            tried = [peak * i / _CANDIDATES for i in range(_CANDIDATES, 0, -1)]
            alpha = min(tried, key=lambda a: float(stats.density.squared_error(mean + spread * a * levels).sum()))
            if (
                not peak
            ):  # all zeros: three standard deviations of the expected values; weights are in units of their own
                alpha = 3.0 if self.normalize else 3 * math.sqrt(math.pi / 2) * usual_magnitude(self.shape)
        with torch.no_grad():
            self.alpha.fill_(max(float(alpha), _LEAST_ALPHA))
        self.mark_ready()

    @property
    def zero_point(self) -> Tensor:
        return torch.zeros_like(self.alpha.detach())

    def index(self, v: Tensor) -> Tensor:
        """Returns the codes of values that are divided by the clip: signed indices into the levels."""
        nearest = level_grid(v, self.unit_levels, torch.ones_like(self.alpha.detach()))
        return torch.searchsorted(self.unit_levels, nearest.contiguous()).int() + self.limits[0]

    def value(self, codes: Tensor) -> Tensor:
        """Returns the levels of codes times the clip."""
        return self.unit_levels[(codes - self.limits[0]).long()] * self.alpha

    def on_optimizer_step(self, latent: Tensor | None) -> None:
        self.alpha.data.clamp_min_(_LEAST_ALPHA)

    def must_stay_positive(self) -> Tensor:
        return self.alpha.detach()

    def describe(self) -> dict[str, Any]:
        kind = "sums of powers of two" if self.additive else "powers of two"
        return super().describe() | {"range": f"{kind}, learned from {self.range}"}

    def _load_from_state_dict(self, *args: Any) -> None:
        super()._load_from_state_dict(*args)
        self._make_levels()


class APoTWeight(_APoT):
    """`w^ = alpha * std * nearest level of w~ / alpha`, `w~ = (w - mean) / std`; mean and std are computed from the tensor at each step.

    Levels: 2^bits - 1 including zero, `+-` sums of one power of two from each set; ternary at 2 bits. Ties go to the smaller magnitude.
    Gradients: to w, 1 everywhere (the statistics count as constants); to alpha, `sign(w~)` where `|w~| > alpha`, else the level minus
    `w~ / alpha`, times std where the spread is restored. alpha is one scalar of at least 1e-3. Saved: alpha, the grid's limits.
    Not idempotent, since the result has a different mean and spread. Levels are not evenly spaced, so there is no error bound of half a
    step.

    Args:
        bits: 2..7, sign included.
        shape, granularity, rounding: See `Quantizer`; one alpha per tensor, nearest level.
        range: The first clip in standard deviations: a number (3 in the paper), or `mse`, the clip with the least squared error.
        additive: False quantizes to plain powers of two.
        normalize: False skips the normalisation, which is part of the method: at few bits, training from a clip of 3 then fails.
        rescale: `std` multiplies by the spread that normalisation removed; `none` leaves the scale to the batch norm, as published.

    Source: Li, Dong, Wang 2020 (arXiv 1909.13144), equations 4-9.
    Differs from the paper: `rescale: std`. Before a batch norm in training it is the same network; running statistics, layers without a
    batch norm, and weight decay keep their usual scale. The first clip of the shipped recipe is the one with the least error.

    >>> q = APoTWeight(4, (4,), range=1.5, normalize=False)
    >>> q.fit(TensorStats.of(torch.tensor([-2.0, 1.4])))
    >>> [round(v, 4) for v in q(torch.tensor([-2, -0.33, 0.52, 1.1])).tolist()]
    [-1.5, -0.3, 0.45, 1.2]
    """

    properties = frozenset({"monotone", "needs_calibration"})
    sites = frozenset({"weight"})
    bits_allowed = (2, 7)

    def __init__(
        self,
        bits: int,
        shape: tuple[int, ...] = (1,),
        *,
        range: Literal["mse"] | float = 3.0,
        additive: bool = True,
        normalize: bool = True,
        rescale: Literal["std", "none"] = "std",
        **common: Any,
    ) -> None:
        super().__init__(bits, shape, signed=True, range=range, additive=additive, **common)
        if rescale not in ("std", "none"):
            raise QexpError(f"APoTWeight: rescale={rescale!r}; allowed are std, none")
        self.normalize, self.rescale = normalize, rescale
        self.register_buffer("mean", torch.zeros(()), persistent=False)
        self.register_buffer("spread", torch.ones(()), persistent=False)

    def fit(self, stats: TensorStats, followed_by_relu: bool = False) -> None:
        if not self.normalize:
            log.warning(
                "%s: APoT without weight normalisation (normalize: false) has its clip in units of the "
                "weights; at few bits, training from a clip of 3 fails",
                self.name,
            )
            return self.start(stats)
        spread = torch.where(stats.std > 0, stats.std, torch.ones_like(stats.std))
        self.start(stats, stats.mean, spread)

    @property
    def scale(self) -> Tensor:
        """Mean spacing of the levels, `[]`."""
        return self.alpha.detach() * self._restored() / self.limits[1]

    def forward(self, x: Tensor) -> Tensor:
        self.require_ready()
        y = level_grid(self._normalized(x.float()), self.unit_levels, self.alpha, clip_gradient=False)
        return (y * self._restored()).to(x.dtype)

    def codes(self, x: Tensor) -> Tensor:
        self.require_ready()
        return self.index(self._normalized(x.detach().float()) / self.alpha.detach())

    def dequantize(self, codes: Tensor) -> Tensor:
        return self.value(codes) * self._restored()

    def _restored(self) -> Tensor | float:
        return self.spread.clone() if self.rescale == "std" else 1.0  # the buffer changes with the next call

    def _normalized(self, w: Tensor) -> Tensor:
        if not self.normalize:
            return w
        with torch.no_grad():
            exact = w.double()
            std = exact.std() if w.numel() > 1 else exact.new_zeros(())
            self.mean.copy_(exact.mean())
            self.spread.copy_(torch.where(std > 0, std, 1.0).clamp_min(torch.finfo(torch.float32).tiny))
        return (w - self.mean) / self.spread.clone()


class APoTInput(_APoT):
    """`x^ = alpha * nearest level of x / alpha`; levels are sums of powers of two on [0, 1], or on [-1, 1] for a signed tensor.

    Levels: unsigned 2^bits, signed 2^bits - 1. Ties go to the smaller magnitude. Gradients: to x, 1 up to the clip (included), 0
    beyond; to alpha, the outermost level beyond the clip, else the level minus `x / alpha`. alpha is one scalar of at least 1e-3.
    Saved: alpha, the grid's limits. Levels are not evenly spaced, so there is no error bound of half a step.

    Args:
        bits: 1..6.
        shape, granularity, rounding, signed: See `AffineQuantizer`; one alpha per tensor, nearest level.
        range: The first clip: a number (8 for CIFAR, 6 for ImageNet in the paper), or `mse`, the clip with the least squared error.
        additive: False quantizes to plain powers of two.

    Source: Li, Dong, Wang 2020 (arXiv 1909.13144), equations 4-7.
    Differs from the paper: the signed form, for tensors without a ReLU before them; `range: mse`.

    >>> q = APoTInput(2, (3,), signed=False, range=1.0)
    >>> q.fit(TensorStats.of(torch.tensor([0.0, 2.0])))
    >>> q(torch.tensor([0.3, 0.7, 2.0])).tolist()
    [0.25, 0.5, 1.0]
    """

    sites = frozenset({"input", "output"})
    bits_allowed = (1, 6)

    def __init__(
        self,
        bits: int,
        shape: tuple[int, ...] = (1,),
        *,
        signed: bool | Literal["auto"] = "auto",
        range: Literal["mse"] | float = 8.0,
        additive: bool = True,
        **common: Any,
    ) -> None:
        super().__init__(bits, shape, signed=signed, range=range, additive=additive, **common)

    def fit(self, stats: TensorStats, followed_by_relu: bool = False) -> None:
        self.choose_sign(stats)
        self.start(stats)

    @property
    def scale(self) -> Tensor:
        """Mean spacing of the levels, `[]`."""
        return self.alpha.detach() / self.limits[1]

    def forward(self, x: Tensor) -> Tensor:
        self.require_ready()
        return level_grid(x, self.unit_levels, self.alpha)

    def codes(self, x: Tensor) -> Tensor:
        self.require_ready()
        return self.index(x.detach().float() / self.alpha.detach())

    def dequantize(self, codes: Tensor) -> Tensor:
        return self.value(codes)
