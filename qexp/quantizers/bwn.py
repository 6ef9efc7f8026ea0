"""BWN: each weight becomes its sign times the mean magnitude of its filter."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from qexp.errors import QexpError
from qexp.quantizers.base import Quantizer

FORMS = ("ste", "clipped", "paper", "exact")


class _ScaledSigns(torch.autograd.Function):
    """`scale * signs`; `form` selects the gradient to the float weight (see `scaled_signs`)."""

    @staticmethod
    def forward(ctx: Any, latent: Tensor, signs: Tensor, scale: Tensor, form: str, numel: int) -> Tensor:
        ctx.save_for_backward(latent, signs, scale)
        ctx.form, ctx.numel = form, numel
        return (signs * scale).to(latent.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        latent, signs, scale = ctx.saved_tensors
        if ctx.form == "ste":
            return grad, None, None, None, None
        if ctx.form == "clipped":
            return (grad * scale * (latent.abs() <= 1)).to(grad.dtype), None, None, None, None
        through_scale = grad / ctx.numel
        if ctx.form in ("exact", "scale"):
            shared = tuple(d for d in range(grad.ndim) if d >= scale.ndim or scale.shape[d] == 1)
            through_scale = torch.sign(latent) * (grad * signs).sum(shared, keepdim=True) / ctx.numel
        through_sign = grad if ctx.form == "scale" else grad * scale * (latent.abs() <= 1)
        return (through_scale + through_sign).to(grad.dtype), None, None, None, None


def scaled_signs(latent: Tensor, signs: Tensor, scale: Tensor, form: str) -> Tensor:
    """Returns `scale * signs` in the shape and dtype of `latent`.

    Args:
        latent: The float weights, which receive the gradient.
        signs: -1 or +1 (or any value, where a method has intermediate ones), in the shape of `latent`.
        scale: Broadcasts against the signs, with the same number of dimensions; each element is the mean magnitude of its weights.
        form: `ste`: dW = g. `clipped`: dW_i = g_i scale 1[|W_i| <= 1]. `paper`: dW_i = g_i (1/n + scale 1[|W_i| <= 1]), with n the
            number of weights per scale. `exact`: the first term becomes sign(W_i)/n times the sum of g q over those weights. `scale`: that
            exact term plus g.
    """
    return _ScaledSigns.apply(latent, signs, scale, form, latent.numel() // max(scale.numel(), 1))


class BWN(Quantizer):
    """`alpha * sign(w)` with `alpha = mean|w|` of each output filter; sign(0) = +1.

    Levels: 2, at -alpha and +alpha, so 1 bit only. No rounding; zero is the only tie. Gradient to the float weight: see `gradient`. No
    calibration: alpha is computed from the tensor at each forward. Not idempotent in floating point (the mean of n equal numbers need
    not equal that number). No error bound: half a step is alpha, but a weight may be arbitrarily large. Saved: alpha as last used.

    Args:
        bits, shape, rounding: See `Quantizer`; 1 bit, nothing is rounded.
        granularity: One alpha per `channel` (paper), `tensor` or `group:N`.
        scaled: Whether alpha multiplies the signs; false leaves -1 and +1, which a batch norm must follow.
        gradient: `ste` is straight through; `clipped` multiplies by `alpha 1[|w| <= 1]` (ReActNet); `paper` multiplies by
            `1/n + alpha 1[|w| <= 1]`; `exact` uses alpha's true derivative.
        clip_latent: Keep the float weight in [-1, 1] after each optimizer step.

    Source: Rastegari et al. 2016 (arXiv 1603.05279), section 3.1 and equation 4 (gradient).
    Differs from the paper: the straight-through gradient is the default.

    >>> q = BWN(1, (4,))
    >>> [round(v, 4) for v in q(torch.tensor([0.5, -0.2, 0.3, -1.4])).tolist()]
    [0.6, -0.6, 0.6, -0.6]
    """

    properties = frozenset({"monotone"})
    sites = frozenset({"weight"})
    bits_allowed = (1, 1)

    def __init__(
        self,
        bits: int = 1,
        shape: tuple[int, ...] = (1,),
        *,
        scaled: bool = True,
        gradient: Literal["ste", "clipped", "paper", "exact"] = "ste",
        clip_latent: bool = False,
        **common: Any,
    ) -> None:
        super().__init__(bits, shape, **common)
        if gradient not in FORMS:
            raise QexpError(f"BWN: gradient={gradient!r}; allowed are {', '.join(FORMS)}")
        if not scaled and gradient == "exact":
            raise QexpError(
                "BWN: gradient=exact is not allowed with scaled=false, which has no alpha; use ste, clipped or paper"
            )
        self.scaled, self.gradient, self.clip_latent = scaled, gradient, clip_latent
        self.register_buffer("alpha", torch.ones(self.granularity.scale_shape(self.shape)))

    @property
    def limits(self) -> tuple[int, int]:
        return 0, 1

    @property
    def scale(self) -> Tensor:
        return 2 * self.alpha

    @property
    def zero_point(self) -> Tensor:
        """One half: the two codes lie on either side of zero."""
        return torch.full_like(self.alpha, 0.5)

    def forward(self, x: Tensor) -> Tensor:
        self._measure(x)
        w, _ = self.rows(x)
        signs = torch.where(w.detach() >= 0, 1.0, -1.0)
        alpha = self.alpha.clone()  # a copy: a later forward may change the buffer before this one's backward pass
        alpha = alpha.reshape([-1] + [1] * (w.ndim - 1)) if alpha.numel() == 1 else alpha
        return scaled_signs(w, signs, alpha, self.gradient).reshape(x.shape)

    def codes(self, x: Tensor) -> Tensor:
        self._measure(x)
        return (x.detach() >= 0).int()

    def dequantize(self, codes: Tensor) -> Tensor:
        rows, _ = self.rows(codes)
        return ((2.0 * rows - 1) * self.alpha).reshape(codes.shape)

    @torch.no_grad()
    def _measure(self, x: Tensor) -> None:
        if self.scaled and x.numel():
            magnitude = self.granularity.rows(x.detach().float().abs()).mean(1)
            self.alpha.copy_(magnitude.reshape(self.alpha.shape))

    def on_optimizer_step(self, latent: Tensor | None) -> None:
        if self.clip_latent and latent is not None:
            latent.data.clamp_(-1, 1)

    def describe(self) -> dict[str, Any]:
        return super().describe() | {"signed": True, "range": "mean |w|" if self.scaled else "none"}
