"""Analytic clipping (ACIQ): the clip with the least expected error for a tensor with a Laplace or normal distribution."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from typing import ClassVar, Literal

import numpy as np
import torch
from scipy.optimize import brentq, minimize_scalar
from scipy.special import erf, lambertw
from torch import Tensor

from qexp.errors import QexpError
from qexp.numerics.grid import UniformGrid
from qexp.ranges.alpha import prior_range, rectified, takes_half
from qexp.ranges.base import Context
from qexp.statistics.stats import TensorStats

_PRIORS = ("laplace", "gauss")


@dataclass(frozen=True)
class ACIQ:
    """Picks a range around the mean that ends at a clip: `alpha` times the scale of a fitted prior.

    Full range: `low = max(min, mean - alpha)`, `high = low + 2 alpha`. Half range (a tensor that goes straight into a ReLU, or that has
    no negative values): `low = 0`, `high = max(mean, 0) + alpha`, with the constant of one bit more (analytic).

    The prior describes the tensor before its ReLU. After the ReLU only the positive half is left. The prior is then centred at zero, its
    scale is that of the positive half (`b` its mean, `sigma` its root mean square), and `high = alpha`.

    Args:
        prior: `laplace` (scale b = E|x - E x|) or `gauss` (scale sigma).
        alpha: `analytic` is optimal for the paper's model, 2^M equal steps. `exact` is optimal for the actual quantizer (2^M - 1 steps,
            zero representable); it clips 9-12 % tighter at 2 bits and within 2 % from 4 bits up.
        half: `auto` uses the half range where a ReLU follows or all values are non-negative; `true` and `false` force the choice.
        clip_to_observed: Keep the range within the observed extremes (the paper does not, which costs accuracy at 8 bits).

    Source: Banner, Nahshan, Soudry 2019 (arXiv 1810.05723), equations 6-10; the half range as in their code.
    Differs from the paper: constants are computed, never read from rounded tables; a channel with its own width uses the constant of
    that width for both priors.
    """

    prior: Literal["laplace", "gauss"] = "laplace"
    alpha: Literal["analytic", "exact"] = "analytic"
    half: Literal["auto"] | bool = "auto"
    clip_to_observed: bool = False
    needs_histogram: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if self.prior not in _PRIORS:
            raise QexpError(f"ACIQ: prior={self.prior!r} is not allowed; use {', '.join(_PRIORS)}")
        if self.alpha not in ("analytic", "exact"):
            raise QexpError(f"ACIQ: alpha={self.alpha!r} is not allowed; use analytic or exact")

    def __call__(self, stats: TensorStats, grid: UniformGrid, context: Context) -> tuple[Tensor, Tensor]:
        half = takes_half(self.half, stats, context)
        alpha = self.clip(stats, grid, half)
        if context.symmetric and not half:
            high = stats.mean.abs() + alpha
            if self.clip_to_observed:
                high = torch.minimum(high, torch.maximum(stats.min.abs(), stats.max.abs()))
            return -high, high
        return prior_range(alpha, stats, half, (stats.min, stats.max), self.clip_to_observed)

    def clip(self, stats: TensorStats, grid: UniformGrid, half: bool) -> Tensor:
        """Returns alpha `[G]`; each channel uses the constant of its own width."""
        scale = stats.b if self.prior == "laplace" else stats.std
        if half and rectified(stats):
            n = stats.positive.clamp_min(1)
            scale = stats.positive_total / n if self.prior == "laplace" else (stats.positive_squares / n).sqrt()
        bits = grid.bits.flatten().tolist() if isinstance(grid.bits, Tensor) else [grid.bits] * len(scale)
        return torch.tensor([self.constant(int(b), half) for b in bits], dtype=torch.float64) * scale

    def constant(self, bits: int, half: bool) -> float:
        """Returns the ratio of alpha to the scale of the prior for a width."""
        return (
            exact_alpha(self.prior, bits, half)
            if self.alpha == "exact" and bits > 0  # a channel of 0 bits is a constant for any range
            else analytic_alpha(self.prior, bits + int(half))
        )


@cache
def analytic_alpha(prior: str, bits: float) -> float:
    """Returns the optimal clip of the analytic model (2^bits equal steps on `[-alpha, alpha]`), divided by b or sigma."""
    steps = 3.0 * 4.0**bits
    if prior == "laplace":
        return float(lambertw(steps).real)
    # half the derivative of the normal model: the clipping term dominates on the left, the rounding term on the right
    return float(brentq(lambda a: a / steps - _normal_excess(a), 1e-9, 40.0, xtol=1e-13, rtol=1e-14))


def _normal_excess(a: float) -> float:
    """Returns `E[max(|x| - a, 0)]` of a standard normal x."""
    return math.sqrt(2 / math.pi) * math.exp(-a * a / 2) - a * math.erfc(a / math.sqrt(2))


def analytic_error(prior: str, alpha: float, bits: float) -> float:
    """Returns the model's expected squared error for a unit-scale prior: clipping part plus rounding part."""
    rounding = alpha**2 / (3.0 * 4.0**bits)
    if prior == "laplace":
        return 2 * math.exp(-alpha) + rounding
    clipped = (1 + alpha**2) * math.erfc(alpha / math.sqrt(2)) - math.sqrt(2 / math.pi) * alpha * math.exp(
        -(alpha**2) / 2
    )
    return clipped + rounding


@cache
def exact_alpha(prior: str, bits: int, half: bool) -> float:
    """Returns the clip with the least expected error of the actual quantizer, divided by b or sigma.

    The quantizer has 2^bits - 1 steps, with zero on a level. At few bits the expected error has several local minima, so the search first
    scans and then refines.
    """
    candidates = np.linspace(0.2, 16.0, 1581)
    errors = [exact_error(prior, a, bits, half) for a in candidates]
    i = int(np.argmin(errors))
    around = (candidates[max(i - 1, 0)], candidates[min(i + 1, len(candidates) - 1)])
    found = minimize_scalar(
        lambda a: exact_error(prior, a, bits, half), bounds=around, method="bounded", options={"xatol": 1e-8}
    )
    return float(found.x if found.fun < errors[i] else candidates[i])


def exact_error(prior: str, alpha: float, bits: int, half: bool) -> float:
    """Returns the expected squared error of the affine quantizer for a unit-scale prior, in closed form as a sum over levels."""
    n = 2**bits - 1
    step = alpha / n if half else 2 * alpha / n
    zero = 0.0 if half else float(np.rint(alpha / step))
    levels = (np.arange(n + 1) - zero) * step
    bounds = np.concatenate([[0.0 if half else -np.inf], (levels[1:] + levels[:-1]) / 2, [np.inf]])
    moments = _laplace_moments(bounds) if prior == "laplace" else _normal_moments(bounds)
    m0, m1, m2 = (np.diff(m) for m in moments)
    return float(np.sum(m2 - 2 * levels * m1 + levels**2 * m0))


def _normal_moments(t: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns the integrals of 1, x, x^2 times the standard normal density from -inf to t."""
    finite = np.where(np.isfinite(t), t, 0.0)
    density = np.where(np.isfinite(t), np.exp(-(finite**2) / 2) / math.sqrt(2 * math.pi), 0.0)
    below = 0.5 * (1 + erf(t / math.sqrt(2)))
    return below, -density, below - finite * density


def _laplace_moments(t: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns the integrals of 1, x, x^2 times the unit Laplace density from -inf to t."""
    a = np.where(np.isfinite(t), np.abs(t), 0.0)
    e = np.where(np.isfinite(t), np.exp(-a) / 2, 0.0)
    negative = t < 0
    m0 = np.where(negative, e, 1 - e)
    m1 = -e * (a + 1)
    tail = e * (a**2 + 2 * a + 2)
    return m0, m1, np.where(negative, tail, 2 - tail)
