"""AdaBin: binary levels at free positions instead of -1 and +1, computed for weights and learned for activations."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn

from qexp.errors import QexpError
from qexp.quantizers.base import Quantizer
from qexp.quantizers.surrogate import BinaryWeight, Sloped, slope
from qexp.statistics.stats import TensorStats

_LEAST_STD = 1e-12
_LEAST_ALPHA = 1e-3


class AdaBinWeight(BinaryWeight):
    """`w^ = alpha sign(u) + beta` with `u = (w - beta) / alpha`, beta the mean and alpha the standard deviation of a filter.

    Levels: 2 per filter, at beta - alpha and beta + alpha, so 1 bit only; sign(0) = +1; alpha is the population deviation (biased).
    Gradient, with s = sign(u), h the surrogate's slope at u and n weights in a filter:
    `dw_i = h_i g_i + (1/n) (sum_j g_j (1 - h_j) + u_i sum_j g_j (s_j - h_j u_j))`. No calibration: mean and deviation are the tensor's own.
    Not idempotent, not monotone (the statistics move with each weight), and no error bound of half a step: a weight may lie far
    from its level. Saved: both levels as last used, the step and the number of steps of `ede`.

    Args:
        bits, shape, granularity, rounding, gradient, tmin, tmax: See `BinaryWeight`.

    Source: Tu et al. 2022, "AdaBin" (arXiv 2208.08084), equations 6-9.
    Differs from the paper: `ede` advances with each optimizer step instead of each epoch and starts at 0.1, where the authors' code starts
    at 0.001; a filter whose weights are all equal raises an error when training starts.

    >>> q = AdaBinWeight(1, (6,))
    >>> [round(v, 4) for v in q(torch.tensor([0.5, -0.2, 0.3, -1.4, 0.1, 0.4])).tolist()]
    [0.5949, -0.6949, 0.5949, -0.6949, 0.5949, 0.5949]
    """

    centred = True

    def parts(self, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        beta = rows.mean(1, keepdim=True)
        alpha = rows.std(1, correction=0, keepdim=True).clamp_min(_LEAST_STD)
        return (rows - beta) / alpha, alpha, beta

    def on_training_start(self, latent: Tensor | None, total_steps: int) -> None:
        super().on_training_start(latent, total_steps)
        self.refuse_equal_weights(latent)

    def describe(self) -> dict[str, Any]:
        return super().describe() | {"range": "mean and deviation"}


class _TwoLevels(torch.autograd.Function):
    """`alpha sign(u) + centre` with `u = (x - beta) / alpha`; the gradients of `AdaBinInput`."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, values: Tensor, alpha: Tensor, beta: Tensor, kind: str, t: float, scaled: bool
    ) -> Tensor:
        ctx.save_for_backward(x, alpha, beta)
        ctx.kind, ctx.t, ctx.scaled = kind, t, scaled
        return values.to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, alpha, beta = ctx.saved_tensors
        u = (x.float() - beta) / alpha
        g = grad.float()
        through = slope(u, ctx.kind, ctx.t).mul_(g)
        signs = (x >= beta).to(g.dtype).mul_(2).sub_(1)
        if ctx.scaled:  # the centre is alpha beta
            signs += beta
        dalpha = (g * signs).sum() - (through * u).sum()
        dbeta = (g.sum() * alpha if ctx.scaled else g.sum()) - through.sum()
        return through.to(grad.dtype), None, dalpha.reshape(alpha.shape), dbeta.reshape(beta.shape), None, None, None


class AdaBinInput(Sloped, Quantizer):
    """`x^ = alpha sign(u) + beta` with `u = (x - beta) / alpha`; alpha and beta are learned, one pair per tensor.

    Levels: 2, at beta - alpha and beta + alpha, so 1 bit only; a value at beta goes up. Gradients, with h the surrogate's slope at u:
    `dx = g h`, `dbeta = sum g (1 - h)`, `dalpha = sum g (sign(u) - u h)`. No error bound: half a step is alpha, but a value may lie
    arbitrarily far from its level. After each optimizer step alpha is at least 0.001. Saved: alpha and beta.

    Args:
        bits, shape, granularity, rounding: See `Quantizer`; 1 bit, one pair of levels per tensor, nothing is rounded.
        gradient: `ste`, `approx`, `ede` or `identity` (see `surrogate.slope`).
        tmin, tmax: Sharpness of `ede` at the first step and after the last.
        centre: `paper`, or `code` for `alpha (sign(u) + beta)`, as in the authors' code.
        range: `paper` starts at alpha 1, beta 0; `fit` at the mean and the mean distance from it, which is needed where all values have
            one sign.

    Source: Tu et al. 2022, "AdaBin" (arXiv 2208.08084), equations 10-13.
    Differs from the paper: alpha is kept positive; `range=fit` is the default.

    >>> q = AdaBinInput(1, (5,), range="paper")
    >>> x = torch.tensor([-1.2, -0.3, 0.1, 0.6, 1.4])
    >>> q.fit(TensorStats.of(x))
    >>> q(x).tolist()
    [-1.0, -1.0, 1.0, 1.0, 1.0]
    """

    properties = frozenset({"idempotent", "monotone", "needs_calibration"})
    sites = frozenset({"input", "output"})
    bits_allowed = (1, 1)
    granularities = ("tensor",)

    def __init__(
        self,
        bits: int = 1,
        shape: tuple[int, ...] = (1,),
        *,
        gradient: Literal["ste", "approx", "ede", "identity"] = "approx",
        tmin: float = 0.1,
        tmax: float = 10.0,
        centre: Literal["paper", "code"] = "paper",
        range: Literal["paper", "fit"] = "fit",
        **common: Any,
    ) -> None:
        super().__init__(bits, shape, **common)
        for name, got, allowed in (("centre", centre, ("paper", "code")), ("range", range, ("paper", "fit"))):
            if got not in allowed:
                raise QexpError(f"AdaBinInput: {name}={got!r} is not allowed; use {', '.join(allowed)}")
        self.centre, self.range = centre, range
        if centre == "code":  # the levels are around alpha * beta, the threshold is at beta
            self.properties = self.properties - {"idempotent"}
        self.alpha, self.beta = nn.Parameter(torch.ones(1)), nn.Parameter(torch.zeros(1))
        self.take_slope(gradient, tmin, tmax)

    @torch.no_grad()
    def fit(self, stats: TensorStats, followed_by_relu: bool = False) -> None:
        if self.range == "fit":
            self.beta.copy_(stats.mean.reshape(1))
            self.alpha.copy_((stats.deviation / stats.count).reshape(1).clamp_min(_LEAST_ALPHA))
        self.mark_ready()

    @property
    def limits(self) -> tuple[int, int]:
        return 0, 1

    @property
    def scale(self) -> Tensor:
        return 2 * self.alpha.detach()

    @property
    def zero_point(self) -> Tensor:
        """One half minus the distance of the centre from zero, in steps."""
        return 0.5 - self._centre() / self.scale

    def _centre(self) -> Tensor:
        beta, alpha = self.beta.detach(), self.alpha.detach()
        return beta if self.centre == "paper" else alpha * beta

    def forward(self, x: Tensor) -> Tensor:
        values = self.dequantize(self.codes(x))
        t = self.t
        return _TwoLevels.apply(x, values, self.alpha, self.beta, self.gradient, t, self.centre == "code")

    def codes(self, x: Tensor) -> Tensor:
        self.require_ready()
        return (x.detach().float() >= self.beta.detach()).int()

    def dequantize(self, codes: Tensor) -> Tensor:
        return (2.0 * codes - 1) * self.alpha.detach() + self._centre()

    def on_training_start(self, latent: Tensor | None, total_steps: int) -> None:
        self.begin(total_steps)

    @torch.no_grad()
    def on_optimizer_step(self, latent: Tensor | None) -> None:
        self.advance()
        self.alpha.clamp_min_(_LEAST_ALPHA)

    def must_stay_positive(self) -> Tensor:
        return self.alpha.detach()

    def describe(self) -> dict[str, Any]:
        return super().describe() | {"signed": True, "range": "two learned levels"}

    def _load_from_state_dict(self, *args: Any) -> None:
        super()._load_from_state_dict(*args)
        self.read_progress()
