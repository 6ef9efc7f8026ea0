"""A surrogate gradient with bumps at the thresholds: that of a smooth staircase which becomes sharper during training."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from qexp.errors import QexpError
from qexp.quantizers.pact_in_step import PACTInStep


def bump(x: Tensor, clip: Tensor, steps: float, sharpness: Tensor, form: str) -> Tensor:
    """Returns the factor h on the gradient, for each element of `x`.

    With r in [-1/2, 1/2] the distance to the nearest threshold in steps: `normalized` h = a sig'(a r) / (2 sig(a/2) - 1), which averages
    to 1 over a step; `legacy` h = sig'(a r) / (2 sig(a'/2) - 1) with a' = a n/T.
    """
    wide = x if x.dtype == torch.float64 else x.float()
    clip, a = clip.to(wide.dtype), sharpness.to(wide.dtype)
    u = wide * steps / clip - 0.5
    sigmoid = torch.sigmoid(a * (u - torch.round(u)))
    slope = sigmoid * (1 - sigmoid)
    if form == "normalized":
        return a * slope / (2 * torch.sigmoid(a / 2) - 1)
    return slope / (2 * torch.sigmoid(a * steps / clip / 2) - 1)


class _Bump(torch.autograd.Function):
    """The identity; its gradient is multiplied by `bump`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, clip: Tensor, steps: float, sharpness: Tensor, form: str) -> Tensor:
        ctx.save_for_backward(x, clip.clone(), sharpness.clone())
        ctx.steps, ctx.form = steps, form
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, clip, sharpness = ctx.saved_tensors
        return (grad * bump(x, clip, ctx.steps, sharpness, ctx.form)).to(grad.dtype), None, None, None, None


class SigmoidSurrogate(PACTInStep):
    """The forward pass of `PACTInStep`; the gradient to x is multiplied by a bump around each threshold.

    Levels, ties, initialisation and the gradient to the clip are those of `PACTInStep`; the clip is fixed unless `learned`. Gradient to
    x: `1[0 < x < T] h(x)` (see `bump`). The sharpness a goes linearly from `start_sharpness` to `end_sharpness` over the optimizer steps
    of the training. Saved: T, the limits, the step, the number of steps, and a, so that a resumed training continues with them.

    Args:
        bits, shape, granularity, rounding, signed, range, learned: See `PACTInStep`.
        form: `normalized` averages to 1 over a step; `legacy` shrinks all gradients as a grows, and is correct only for T = n.
        start_sharpness, end_sharpness: a at the first step and after the last, > 0.

    Source: Quantized_ResNet.
    Differs from the source: normalized, annealed by optimizer steps instead of epochs, T fixed at n.

    >>> q = SigmoidSurrogate(2, (1,), signed=False, start_sharpness=1.0)
    >>> h = bump(torch.tensor([0.1, 0.5, 1.0]), q.alpha, 3.0, q.sharpness, "normalized")
    >>> [round(v, 4) for v in h.tolist()]
    [0.981, 1.0207, 0.9595]
    """

    def __init__(
        self,
        bits: int,
        shape: tuple[int, ...] = (1,),
        *,
        learned: bool = False,
        form: Literal["normalized", "legacy"] = "normalized",
        start_sharpness: float = 100.0,
        end_sharpness: float = 100.0,
        **common: Any,
    ) -> None:
        super().__init__(bits, shape, learned=learned, **common)
        if form not in ("normalized", "legacy"):
            raise QexpError(f"SigmoidSurrogate: form={form!r}; allowed are normalized, legacy")
        if not (start_sharpness > 0 and end_sharpness > 0):
            raise QexpError(
                f"SigmoidSurrogate: start_sharpness={start_sharpness}, end_sharpness={end_sharpness}; allowed are numbers above 0"
            )
        self.form, self.start_sharpness, self.end_sharpness = form, float(start_sharpness), float(end_sharpness)
        self.register_buffer("step", torch.zeros((), dtype=torch.int64))
        self.register_buffer("total_steps", torch.ones((), dtype=torch.int64))
        self.register_buffer("sharpness", torch.tensor(self.start_sharpness))

    def rounded(self, rows: Tensor, axis: int | None) -> Tensor:
        steps = float(self.limits[1])
        return super().rounded(_Bump.apply(rows, self.alpha.detach(), steps, self.sharpness, self.form), axis)

    def on_training_start(self, latent: Tensor | None, total_steps: int) -> None:
        self.total_steps.fill_(max(total_steps, 1))
        self._anneal()

    def on_optimizer_step(self, latent: Tensor | None) -> None:
        super().on_optimizer_step(latent)
        self.step.add_(1)
        self._anneal()

    @torch.no_grad()
    def _anneal(self) -> None:
        done = (self.step / self.total_steps).clamp_max(1)
        self.sharpness.copy_(self.start_sharpness + (self.end_sharpness - self.start_sharpness) * done)

    def describe(self) -> dict[str, Any]:
        row = super().describe()
        sharpness = f"sharpness {self.start_sharpness:g} to {self.end_sharpness:g}"
        return row | {"range": f"{row['range']}, {self.form} {sharpness}"}
