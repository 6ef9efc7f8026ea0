"""RSign: the sign of an activation relative to a learned threshold per channel."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn

from qexp.quantizers.base import Quantizer
from qexp.quantizers.surrogate import Sloped, sign
from qexp.statistics.stats import TensorStats


class RSign(Sloped, Quantizer):
    """`sign(x - theta)`; theta is learned, one per channel.

    Levels: 2, at -1 and +1, so 1 bit only; a value at its threshold goes up. Gradients, with h the surrogate's slope at `x - theta`:
    `dx = g h`, `dtheta = -sum g h`. theta starts at 0 if the tensor has both signs. If it has only one sign, theta starts at the mean,
    since the sign would otherwise be constant. Not idempotent (a level may lie on the other side of a threshold). No error bound: half a
    step is 1, but a value may be arbitrarily large. Saved: theta.

    Args:
        bits, shape, granularity, rounding: See `Quantizer`; 1 bit, nothing is rounded; `channel` (paper) or `tensor`.
        gradient: `ste`, `approx`, `ede` or `identity` (see `surrogate.slope`).
        tmin, tmax: Sharpness of `ede` at the first step and after the last.

    Source: Liu et al. 2020, "ReActNet" (arXiv 2003.03488), equations 1 and 4.
    Differs from the paper: the start for a tensor with one sign.

    >>> q = RSign(1, (3,))
    >>> q.fit(TensorStats.of(torch.tensor([-1.0, 0.5, 2.0])))
    >>> q(torch.tensor([-0.3, 0.0, 5.0])).tolist()
    [-1.0, 1.0, 1.0]
    """

    properties = frozenset({"monotone", "needs_calibration"})
    sites = frozenset({"input", "output"})
    bits_allowed = (1, 1)
    granularities = ("channel", "tensor")

    def __init__(
        self,
        bits: int = 1,
        shape: tuple[int, ...] = (1,),
        *,
        gradient: Literal["ste", "approx", "ede", "identity"] = "approx",
        tmin: float = 0.1,
        tmax: float = 10.0,
        **common: Any,
    ) -> None:
        super().__init__(bits, shape, **common)
        self.theta = nn.Parameter(torch.zeros(self.granularity.scale_shape(self.shape)))
        self.take_slope(gradient, tmin, tmax)

    @torch.no_grad()
    def fit(self, stats: TensorStats, followed_by_relu: bool = False) -> None:
        one_sided = (stats.min >= 0) | (stats.max < 0)
        start = torch.where(one_sided, stats.mean, torch.zeros_like(stats.mean))
        self.theta.copy_(start.reshape(self.theta.shape))
        self.mark_ready()

    @property
    def limits(self) -> tuple[int, int]:
        return 0, 1

    @property
    def scale(self) -> Tensor:
        return torch.full_like(self.theta.detach(), 2.0)

    @property
    def zero_point(self) -> Tensor:
        """One half: the two codes lie on either side of zero."""
        return torch.full_like(self.theta.detach(), 0.5)

    def forward(self, x: Tensor) -> Tensor:
        self.require_ready()
        u = x.float() - self.theta
        return sign(u, self.gradient, self.t).to(x.dtype)

    def codes(self, x: Tensor) -> Tensor:
        self.require_ready()
        return (x.detach().float() - self.theta.detach() >= 0).int()

    def dequantize(self, codes: Tensor) -> Tensor:
        return 2.0 * codes - 1

    def on_training_start(self, latent: Tensor | None, total_steps: int) -> None:
        self.begin(total_steps)

    def on_optimizer_step(self, latent: Tensor | None) -> None:
        self.advance()

    def describe(self) -> dict[str, Any]:
        return super().describe() | {"signed": True, "range": "learned threshold"}

    def _load_from_state_dict(self, *args: Any) -> None:
        super()._load_from_state_dict(*args)
        self.read_progress()
