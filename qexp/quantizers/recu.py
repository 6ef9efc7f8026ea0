"""ReCU: one-bit weights without a gradient in the tails of the distribution, so that dead weights become active again."""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor, nn

from qexp.errors import QexpError
from qexp.quantizers.surrogate import BinaryWeight
from qexp.statistics.stats import TensorStats

_LEAST_ALPHA = 1e-8
_FIRST, _LAST = 0.85, 0.99  # tau of the schedule
_A = (_LAST - _FIRST) / (math.e - 1)


def scheduled_tau(progress: float) -> float:
    """Returns tau at a share of the training; it grows exponentially from 0.85 to 0.99.

    >>> [round(scheduled_tau(f), 4) for f in (0, 0.5, 1)]
    [0.85, 0.9029, 0.99]
    """
    return _A * math.exp(progress) + _FIRST - _A


class ReCU(BinaryWeight):
    """`w^ = alpha sign(z)`, with z the standardised weight of a filter and alpha learned per filter.

    `z = (w - mean) / (sqrt(var + 1e-5) / (2 sqrt 2))`; `Q = -mean|z| ln(2 - 2 tau)` over the layer. Levels: 2, at -alpha and +alpha, so 1
    bit only; sign(0) = +1. Gradients: `dz = g alpha 1[|z| <= Q]`, then through the standardisation; `dalpha = sum g sign(z)`. alpha starts
    at `mean|w|` of the filter and stays above 1e-8. Not idempotent, not monotone (the statistics move with each weight), and without an
    error bound of half a step: the levels are those of the standardised weight. Saved: alpha, the step and the number of steps of the
    schedule.

    Args:
        bits, shape, granularity, rounding: See `BinaryWeight`.
        tau: `schedule` (0.85 to 0.99 over the optimizer steps), or a fixed number in (0.5, 1).

    Source: Xu et al. 2021, "ReCU" (arXiv 2103.12369), equations 7-13.
    Differs from the paper: alpha starts at the filter's mean magnitude, which keeps the scale of float weights; the authors' code draws
    it from 0..1. tau advances with each optimizer step instead of each epoch.

    >>> q = ReCU(1, (4,))
    >>> w = torch.tensor([0.5, -0.3, 0.3, -1.4])
    >>> q.fit(TensorStats.of(w))
    >>> [round(v, 4) for v in q(w).tolist()]
    [0.625, -0.625, 0.625, -0.625]
    """

    properties = frozenset({"needs_calibration"})

    def __init__(
        self,
        bits: int = 1,
        shape: tuple[int, ...] = (1,),
        *,
        tau: Literal["schedule"] | float = "schedule",
        **common: Any,
    ) -> None:
        super().__init__(bits, shape, **common, gradient="identity")
        if tau != "schedule" and not (isinstance(tau, float) and 0.5 < tau < 1):
            raise QexpError(f"ReCU: tau={tau!r} is not allowed; use schedule, or a number above 0.5 and below 1")
        self.tau = tau
        self.alpha = nn.Parameter(torch.ones_like(self.last_scale))
        self.count_steps(tau == "schedule")

    def fit(self, stats: TensorStats, followed_by_relu: bool = False) -> None:
        with torch.no_grad():
            self.alpha.copy_(stats.mean_abs.reshape(self.alpha.shape).clamp_min(_LEAST_ALPHA))
        self.last_scale.copy_(self.alpha.detach())
        self.mark_ready()

    def parts(self, rows: Tensor) -> tuple[Tensor, Tensor, None]:
        z = self.standardised(rows)
        inside = z.detach().abs() <= self.edge(z.detach())
        return torch.where(inside, z, z.detach()), self.alpha.reshape(-1, 1), None

    @staticmethod
    def standardised(rows: Tensor) -> Tensor:
        """Returns z `[G, n]` of float weights `[G, n]`: mean 0, standard deviation 2 sqrt 2 in each row."""
        variance = rows.var(1, correction=min(1, rows.shape[1] - 1), keepdim=True)
        return (rows - rows.mean(1, keepdim=True)) / ((variance + 1e-5).sqrt() / (2 * math.sqrt(2)))

    def edge(self, z: Tensor) -> Tensor:
        """Returns Q; a standardised weight of larger magnitude gets no gradient."""
        tau = scheduled_tau(self.progress) if self.tau == "schedule" else self.tau
        return -z.abs().mean() * math.log(2 - 2 * tau)

    @torch.no_grad()
    def on_optimizer_step(self, latent: Tensor | None) -> None:
        super().on_optimizer_step(latent)
        self.alpha.clamp_min_(_LEAST_ALPHA)

    def describe(self) -> dict[str, Any]:
        return super().describe() | {"range": f"learned, tau {self.tau}"}
