"""Surrogate gradients of the sign, and the base class of one-bit weights that use them."""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor

from qexp.errors import QexpError
from qexp.numerics.granularity import PerChannel
from qexp.quantizers.base import Quantizer

SLOPES = ("ste", "approx", "ede", "identity")


def slope(u: Tensor, kind: str, t: float = 1.0) -> Tensor:
    """Returns h(u), the surrogate for the gradient of `sign(u)`.

    `ste`: `1[|u| <= 1]`. `approx`: `max(0, 2 - 2|u|)`. `ede`: `k t (1 - tanh^2(t u))` with `k = max(1/t, 1)`. `identity`: 1.

    Source: `approx` Liu et al. 2018 (arXiv 1808.00278), equation 6; `ede` Qin et al. 2020 (arXiv 1909.10788), equation 13.

    >>> slope(torch.tensor([-1.5, -0.4, 0.0, 0.9]), "approx").tolist()[:3]
    [0.0, 1.2000000476837158, 2.0]
    """
    if kind == "ste":
        return (u.abs() <= 1).to(u.dtype)
    if kind == "approx":
        return u.abs().mul_(-2).add_(2).clamp_min_(0)
    if kind == "ede":
        return torch.tanh(t * u).square_().neg_().add_(1).mul_(max(1 / t, 1) * t)
    return torch.ones_like(u)


def sharpness(progress: float, tmin: float, tmax: float) -> float:
    """Returns the sharpness t of `ede` at a share of the training: from `tmin` to `tmax`, evenly in the logarithm."""
    return 10 ** (math.log10(tmin) + (math.log10(tmax) - math.log10(tmin)) * progress)


class _Signs(torch.autograd.Function):
    """The given signs of `u`; the gradient is multiplied by `slope(u)`."""

    @staticmethod
    def forward(ctx: Any, u: Tensor, signs: Tensor, kind: str, t: float) -> Tensor:
        ctx.save_for_backward(u)
        ctx.kind, ctx.t = kind, t
        return signs.to(u.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.kind == "identity":
            return grad, None, None, None
        (u,) = ctx.saved_tensors
        return slope(u, ctx.kind, ctx.t).mul_(grad), None, None, None


def signs_of(x: Tensor) -> Tensor:
    """Returns -1 or +1 in the dtype of `x`, with sign(0) = +1; no gradient."""
    return (x.detach() >= 0).to(x.dtype).mul_(2).sub_(1)


def sign(u: Tensor, kind: str, t: float = 1.0, signs: Tensor | None = None) -> Tensor:
    """Returns `sign(u)`, sign(0) = +1 (or the given signs), whose gradient is multiplied by `slope(u)`."""
    return _Signs.apply(u, signs_of(u) if signs is None else signs, kind, t)


class Progress:
    """Mixin that counts the optimizer steps of a training in buffers of the quantizer; counts nothing where nothing is annealed.

    In a training in stages the count continues: a quantizer that is kept for the next stage stays at the end of its schedule.
    """

    step: Tensor | None
    total_steps: Tensor | None

    def count_steps(self, counts: bool) -> None:
        """Creates the two buffers; called once, in the constructor."""
        for name, value in (("step", 0), ("total_steps", 1)):
            self.register_buffer(name, torch.tensor(value) if counts else None)
        self._done, self._all = 0, 1  # copies on the host, to avoid synchronising with the device

    @property
    def progress(self) -> float:
        """The share of the training's optimizer steps that are done, 0..1."""
        return min(self._done / self._all, 1.0)

    def begin(self, total_steps: int) -> None:
        """Sets the number of steps of the training."""
        if self.step is not None:
            self._all = max(total_steps, 1)
            self.total_steps.fill_(self._all)

    def advance(self) -> None:
        """Counts an optimizer step."""
        if self.step is not None:
            self._done += 1
            self.step.add_(1)

    def read_progress(self) -> None:
        """Reads the count from the buffers after a checkpoint is loaded."""
        if self.step is not None:
            self._done, self._all = int(self.step), int(self.total_steps)


class Sloped(Progress):
    """Mixin for a method whose gradient is a surrogate's slope; counts steps for `ede`, whose sharpness grows."""

    def take_slope(self, gradient: str, tmin: float, tmax: float) -> None:
        """Sets the surrogate; called once, in the constructor; raises if the surrogate or its sharpness is not allowed."""
        method = type(self).__name__
        if gradient not in SLOPES:
            raise QexpError(f"{method}: gradient={gradient!r} is not allowed; use {', '.join(SLOPES)}")
        if not 0 < tmin <= tmax < math.inf:
            raise QexpError(
                f"{method}: tmin={tmin}, tmax={tmax} are not allowed; use 0 < tmin <= tmax, such as 0.1 and 10"
            )
        self.gradient, self.tmin, self.tmax = gradient, float(tmin), float(tmax)
        self.count_steps(gradient == "ede")

    @property
    def t(self) -> float:
        """The current sharpness of `ede`."""
        return sharpness(self.progress, self.tmin, self.tmax)


class BinaryWeight(Sloped, Quantizer):
    """`scale * sign(u) + centre`, with u, scale and centre computed from the float weights of each filter; a common base class.

    A method implements `parts`. Gradients flow through all of `parts` that is differentiable, and through the surrogate of the sign.

    Args:
        bits, shape, granularity, rounding: See `Quantizer`; 1 bit, nothing is rounded.
        gradient: `ste`, `approx`, `ede` or `identity` (see `slope`).
        tmin, tmax: Sharpness of `ede` at the first step and after the last.
    """

    properties = frozenset()
    sites = frozenset({"weight"})
    bits_allowed = (1, 1)
    centred = False

    def __init__(
        self,
        bits: int = 1,
        shape: tuple[int, ...] = (1,),
        *,
        gradient: Literal["ste", "approx", "ede", "identity"] = "ede",
        tmin: float = 0.1,
        tmax: float = 10.0,
        **common: Any,
    ) -> None:
        super().__init__(bits, shape, **common)
        scale_shape = self.granularity.scale_shape(self.shape)
        self.register_buffer("last_scale", torch.ones(scale_shape))
        self.register_buffer("last_centre", torch.zeros(scale_shape) if self.centred else None)
        self.take_slope(gradient, tmin, tmax)

    def parts(self, rows: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Returns u `[G, n]` (the argument of the sign), the scale and the centre, `[G, 1]`, for float weights `[G, n]`."""
        raise NotImplementedError

    @property
    def limits(self) -> tuple[int, int]:
        return 0, 1

    @property
    def scale(self) -> Tensor:
        return 2 * self.last_scale

    @property
    def zero_point(self) -> Tensor:
        """One half minus the distance of the centre from zero, in steps."""
        half = torch.full_like(self.last_scale, 0.5)
        tiny = torch.finfo(torch.float32).tiny
        return half if self.last_centre is None else half - self.last_centre / self.scale.clamp_min(tiny)

    def forward(self, x: Tensor) -> Tensor:
        self.require_ready()
        rows = self.granularity.rows(x.float())
        u, scale, centre = self.parts(rows)
        self._keep(scale, centre)
        y = sign(u, self.gradient, self.t) * scale
        return self._from_rows(y if centre is None else y + centre, x).to(x.dtype)

    def codes(self, x: Tensor) -> Tensor:
        self.require_ready()
        with torch.no_grad():
            u, scale, centre = self.parts(self.granularity.rows(x.detach().float()))
            self._keep(scale, centre)
        return self._from_rows((u >= 0).int(), x)

    def dequantize(self, codes: Tensor) -> Tensor:
        rows = self.granularity.rows(codes)
        y = (2.0 * rows - 1) * self.last_scale.reshape(-1, 1)
        return self._from_rows(y if self.last_centre is None else y + self.last_centre.reshape(-1, 1), codes)

    @torch.no_grad()
    def _keep(self, scale: Tensor, centre: Tensor | None) -> None:
        self.last_scale.copy_(scale.detach().reshape(self.last_scale.shape))
        if centre is not None:
            self.last_centre.copy_(centre.detach().reshape(self.last_scale.shape))

    def _from_rows(self, rows: Tensor, like: Tensor) -> Tensor:
        """Returns rows `[G, n]` in the shape of their tensor."""
        if isinstance(self.granularity, PerChannel):
            axis = self.granularity.channel_axis
            return rows.reshape(like.movedim(axis, 0).shape).movedim(0, axis)
        return rows.reshape(like.shape)

    def on_training_start(self, latent: Tensor | None, total_steps: int) -> None:
        self.begin(total_steps)

    def on_optimizer_step(self, latent: Tensor | None) -> None:
        self.advance()

    def refuse_equal_weights(self, latent: Tensor | None) -> None:
        """Raises if a filter's weights are all equal: without spread, training never changes its signs."""
        if latent is None:
            return
        rows = self.granularity.rows(latent.detach())
        flat = int((rows.amax(1) == rows.amin(1)).sum()) if rows.numel() else 0
        if flat:
            raise QexpError(
                f"{self.name}: degenerate_filter: all weights are equal in {flat} of {len(rows)} filters, so that "
                f"{type(self).__name__} cannot train them; use another method there with a rule (quant=bwn), or other weights"
            )

    def describe(self) -> dict[str, Any]:
        return super().describe() | {"signed": True}

    def _load_from_state_dict(self, *args: Any) -> None:
        super()._load_from_state_dict(*args)
        self.read_progress()
