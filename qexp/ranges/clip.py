"""The clipping rules of the ACIQ experiments, selected by name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from qexp.errors import QexpError
from qexp.numerics.grid import UniformGrid
from qexp.ranges.aciq import ACIQ
from qexp.ranges.alpha import alpha_range, prior_range, takes_half, zero_range
from qexp.ranges.base import Context
from qexp.ranges.kl import KL
from qexp.ranges.minmax import MinMax
from qexp.ranges.mix import least_error
from qexp.statistics.stats import TensorStats

Alpha = Callable[[str, TensorStats, UniformGrid, bool], Tensor]


def _prior(rule: ACIQ) -> Alpha:
    return lambda _, stats, grid, half: rule.clip(stats, grid, half)


_ALPHAS: dict[str, Alpha] = {
    "laplace": _prior(ACIQ("laplace")),
    "gauss": _prior(ACIQ("gauss")),
    "exact": lambda prior, stats, grid, half: ACIQ(prior or "laplace", "exact").clip(stats, grid, half),
    "std": lambda p, stats, grid, half: float(p) * stats.std,
    "ratio": lambda rho, stats, grid, half: float(rho) * stats.min.abs().maximum(stats.max.abs()),
    "kld": lambda _, stats, grid, half: KL()(stats, grid, Context())[1],
}
_PRIORS = {"laplace", "gauss", "exact"}
_WITH_NUMBER = {"std", "ratio"}
_KINDS = "none, laplace, gauss, exact, exact:gauss, std:<p>, ratio:<rho>, kld, mix"


@dataclass(frozen=True)
class Clip:
    """Picks the full or half range of one clip kind.

    Args:
        kind: `none` (the observed range), `laplace` and `gauss` (analytic optimum, see `ACIQ`, also for a tensor after its ReLU),
            `exact` (optimum of the actual quantizer for a Laplace prior, `exact:gauss` for a normal one), `std:<p>` (p standard
            deviations), `ratio:<rho>` (`[-a, a]`, or `[0, a]` in the half range, for any mean: `a` is this share of the greatest
            magnitude, on either side of zero), `kld` (least divergence), `mix` (for each channel, the one of none, gauss and laplace
            with the least error on the calibration images).
        over: Source of the observed extremes: `all` (the source's `extreme`), `batches` (its `mean`: averaged over batches) or
            `samples` (its batch average).
        half: `auto` uses the half range where a ReLU follows or all values are non-negative; `true` and `false` force the choice.
        clip_to_observed: Limit the range to the observed width.

    Source: Banner et al. 2019 (arXiv 1810.05723), the clip options of their experiments.
    Differs from the source: `mix` compares all three errors, not laplace with gauss and then gauss with none; it needs measured errors
    and fails without them. A channel with its own width uses the constant of that width for both priors. b and sigma are computed over
    all calibration images together, not per batch and then averaged.
    """

    kind: str = "laplace"
    over: Literal["all", "batches", "samples"] = "all"
    half: Literal["auto"] | bool = "auto"
    clip_to_observed: bool = False

    def __post_init__(self) -> None:
        name, _, argument = self.kind.partition(":")
        known = name in ("none", "mix") and not argument
        known |= name in _WITH_NUMBER and _positive(argument)
        known |= name == "exact" and argument in ("", "laplace", "gauss")
        known |= name in _ALPHAS and name not in _WITH_NUMBER and not argument
        if not known:
            raise QexpError(f"Clip: kind={self.kind!r} is not allowed; use {_KINDS}, with positive numbers")
        if self.half not in ("auto", True, False):
            raise QexpError(f"Clip: half={self.half!r} is not allowed; use auto, true or false")
        MinMax(self.over)

    @property
    def needs_histogram(self) -> bool:
        """Whether the kind needs the distribution of the values, not only their moments."""
        return self.kind in ("mix", "kld")

    def __call__(self, stats: TensorStats, grid: UniformGrid, context: Context) -> tuple[Tensor, Tensor]:
        half = takes_half(self.half, stats, context)
        if self.kind == "mix":
            kinds = (Clip(k, self.over, half, self.clip_to_observed) for k in ("none", "gauss", "laplace"))
            return least_error([rule(stats, grid, context) for rule in kinds], stats, grid, context)
        observed = MinMax(self.over)(stats, grid, context)
        if self.kind == "none":
            low, high = observed
            return (low * 0, high.clamp_min(0)) if half else (low, high)
        name, _, argument = self.kind.partition(":")
        alpha = _ALPHAS[name](argument, stats, grid, half)
        if name == "ratio":
            return zero_range(alpha, half, observed, self.clip_to_observed)
        if name in _PRIORS:
            return prior_range(alpha, stats, half, observed, self.clip_to_observed)
        return alpha_range(alpha, stats, half, observed, self.clip_to_observed)


def _positive(text: str) -> bool:
    try:
        return 0 < float(text) < float("inf")
    except ValueError:
        return False
