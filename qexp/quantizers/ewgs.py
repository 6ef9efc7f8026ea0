"""EWGS: the gradient of each rounded value is scaled up or down by the direction of its rounding error."""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor, nn

from qexp.errors import QexpError
from qexp.quantizers.base import Quantizer
from qexp.statistics.stats import TensorStats

_LEAST_WIDTH = 1e-6
_HALF_NORMAL = 3 / math.sqrt(1 - 2 / math.pi)  # three standard deviations of a half-normal distribution
_MOST_DELTA = 0.95  # as a share of 2 (levels - 1), where the gradient's factor becomes negative


class _Round(torch.autograd.Function):
    """`round(n x) / n`; the gradient g becomes `g (1 + delta sign(g) (x - x_q))`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, n: int, delta: float) -> Tensor:
        rounded = torch.round(x * n) / n
        ctx.save_for_backward(x - rounded)
        ctx.delta = delta
        return rounded

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (moved,) = ctx.saved_tensors
        return grad + ctx.delta * grad.abs() * moved, None, None


class _EWGS(Quantizer):
    """Common base for weights and inputs: the learned limits, the rounding with its gradient, delta."""

    properties = frozenset({"monotone", "needs_calibration"})
    bits_allowed = (1, 8)
    granularities = ("tensor",)
    roundings = ("half_even",)

    def __init__(
        self,
        bits: int,
        shape: tuple[int, ...] = (1,),
        *,
        delta: float | Literal["hessian"] = 1e-3,
        **common: Any,
    ) -> None:
        super().__init__(bits, shape, **common)
        kind = type(self).__name__
        if delta != "hessian" and (isinstance(delta, bool) or not (isinstance(delta, int | float) and delta >= 0)):
            raise QexpError(f"{kind}: delta={delta!r} is not allowed; use hessian, or a number of at least 0 (0.001)")
        self.steps = 2**bits - 1
        self.from_hessian = delta == "hessian"
        self.low, self.high = nn.Parameter(torch.zeros(1)), nn.Parameter(torch.ones(1))
        self.register_buffer("delta", torch.zeros(()))
        self.set_delta(0.0 if self.from_hessian else float(delta))

    def set_delta(self, delta: float) -> float:
        """Sets delta, limited so that the factor on the gradient stays positive; returns the value that was set."""
        self._delta = min(max(delta, 0.0), _MOST_DELTA * 2 * self.steps)
        self.delta.fill_(self._delta)
        return self._delta

    @property
    def limits(self) -> tuple[int, int]:
        return 0, self.steps

    def unit(self, x: Tensor) -> Tensor:
        """Returns x clipped to the limits and normalised to 0..1, with gradients to x and to the limits where `l <= x <= u`."""
        place = (x.float() - self.low) / (self.high - self.low)
        clipped = place.detach().clamp(0, 1)
        return torch.where(place.detach() == clipped, place, clipped)

    def values(self, unit: Tensor) -> Tensor:
        """Returns the real values of normalised levels 0..1."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        self.require_ready()
        return self.values(_Round.apply(self.unit(x), self.steps, self._delta)).to(x.dtype)

    @torch.no_grad()
    def codes(self, x: Tensor) -> Tensor:
        self.require_ready()
        return torch.round(self.unit(x) * self.steps)

    @torch.no_grad()
    def dequantize(self, codes: Tensor) -> Tensor:
        return self.values(codes / self.steps)

    @torch.no_grad()
    def put_limits(self, low: Tensor, high: Tensor) -> None:
        """Sets the first limits; for a tensor without spread the width is 1."""
        low = low.float().reshape(1)
        width = (high.float().reshape(1) - low).clamp_min(0)
        self.low.copy_(low)
        self.high.copy_(low + torch.where(width > _LEAST_WIDTH, width, torch.ones_like(width)))

    @torch.no_grad()
    def on_optimizer_step(self, latent: Tensor | None) -> None:
        self.high.copy_(torch.maximum(self.high, self.low + _LEAST_WIDTH))

    def must_stay_positive(self) -> Tensor:
        return (self.high - self.low).detach()

    def describe(self) -> dict[str, Any]:
        delta = "delta from the Hessian" if self.from_hessian else f"delta {self._delta:g}"
        return super().describe() | {"range": f"learned limits, {delta}"}

    def _load_from_state_dict(self, *args: Any) -> None:
        super()._load_from_state_dict(*args)
        self._delta = float(self.delta)


class EWGSWeight(_EWGS):
    """`w^ = |c| (2 x_q - 1)` with `x_q = round(n x_n) / n` and `x_n = clip((w - l) / (u - l), 0, 1)`, `n = 2^bits - 1`.

    Levels: 2^bits, evenly from -|c| to |c|, none at zero; ties to even. l, u and c are learned. Gradients: the rounding passes g as
    `g (1 + delta sign(g) (x_n - x_q))`; clip, limits and c have their exact gradients; l and u receive theirs only where `l <= w <= u`.
    l and u start at minus and plus three standard deviations, c at `(u - l) / 2`, which keeps the weight's size. Not idempotent and
    without an error bound of half a step, since c is learned separately. Saved: l, u, c, delta.

    Args:
        bits, shape, granularity, rounding: See `Quantizer`; one pair of limits per tensor.
        delta: A number, or `hessian`: 0 until `qexp.callbacks.curvature.Curvature` (callbacks=ewgs) sets it.

    Source: Lee, Kim, Ham 2021, "Network quantization with element-wise gradient scaling" (arXiv 2104.00903), equations 1-5, 8 and 9.
    Differs from the paper: |c| multiplies the weight instead of the layer's result, which is equal where there is no bias.

    >>> q = EWGSWeight(2, (5,))
    >>> w = torch.tensor([-0.9, -0.3, 0.05, 0.45, 0.7])
    >>> q.fit(TensorStats.of(w))
    >>> q.codes(w).tolist()
    [1.0, 1.0, 2.0, 2.0, 2.0]
    """

    sites = frozenset({"weight"})

    def __init__(self, bits: int, shape: tuple[int, ...] = (1,), **common: Any) -> None:
        super().__init__(bits, shape, **common)
        self.c = nn.Parameter(torch.ones(1))

    @torch.no_grad()
    def fit(self, stats: TensorStats, followed_by_relu: bool = False) -> None:
        reach = 3 * _spread(stats)
        self.put_limits(-reach, reach)
        self.c.copy_((self.high - self.low) / 2)
        self.mark_ready()

    def values(self, unit: Tensor) -> Tensor:
        return (2 * unit - 1) * self.c.abs()

    @property
    def scale(self) -> Tensor:
        return 2 * self.c.detach().abs() / self.steps

    @property
    def zero_point(self) -> Tensor:
        """Half of the last code: zero lies between the two middle codes."""
        return torch.full_like(self.c.detach(), self.steps / 2)


class EWGSInput(_EWGS):
    """`x^ = l + (u - l) x_q` with `x_q = round(n x_n) / n` and `x_n = clip((x - l) / (u - l), 0, 1)`, `n = 2^bits - 1`.

    Levels: 2^bits, evenly from l to u; ties to even. l and u are learned. Gradients: as for `EWGSWeight`; with `unscale` the limits also
    receive the gradient of the levels, `du += sum g x_q`, `dl += sum g (1 - x_q)`. l starts at the minimum, u at three times the spread
    of a half-normal tensor, `3 std / sqrt(1 - 2/pi)` (always above l). Not idempotent, and no error bound of half a step where l is far
    from zero and the steps are smaller than float32 resolves. Saved: l, u, delta.

    Args:
        bits, shape, granularity, rounding, delta: See `EWGSWeight`.
        unscale: Restore the real scale; false returns 0..1, as published, and needs a batch norm after it.

    Source: Lee, Kim, Ham 2021 (arXiv 2104.00903), equations 1-5 and 9.
    Differs from the paper: `unscale`, so that a start from float weights keeps each layer's size.

    >>> q = EWGSInput(2, (6,))
    >>> q.fit(TensorStats.of(torch.tensor([0, 0.2, 0.5, 0, 1.1, 0.3])))
    >>> round(q.high.item(), 6)
    2.057968
    """

    sites = frozenset({"input", "output"})

    def __init__(self, bits: int, shape: tuple[int, ...] = (1,), *, unscale: bool = True, **common: Any) -> None:
        super().__init__(bits, shape, **common)
        self.unscale = unscale

    def fit(self, stats: TensorStats, followed_by_relu: bool = False) -> None:
        reach = _HALF_NORMAL * _spread(stats)
        self.put_limits(stats.min, torch.where(reach > stats.min, reach, stats.min + reach))
        self.mark_ready()

    def values(self, unit: Tensor) -> Tensor:
        return self.low + (self.high - self.low) * unit if self.unscale else unit

    @property
    def scale(self) -> Tensor:
        width = (self.high - self.low).detach() if self.unscale else torch.ones_like(self.low.detach())
        return width / self.steps

    @property
    def zero_point(self) -> Tensor:
        """The position of zero, in steps from the least code; in general not an integer."""
        return -self.low.detach() / self.scale if self.unscale else torch.zeros_like(self.low.detach())


def _spread(stats: TensorStats) -> Tensor:
    """Returns the unbiased standard deviation, float64 `[G]`; 0 for a single value."""
    n = stats.count
    return (stats.squares - n * stats.mean.square()).clamp_min(0).div((n - 1).clamp_min(1)).sqrt()
