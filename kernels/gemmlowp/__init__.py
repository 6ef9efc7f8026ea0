"""The GEMMLOWP affine quantizer: a range and an offset in, the quantized tensor out."""

import torch
from torch import Tensor

from .. import check
from ..errors import KernelError
from ..library import define, differentiable, first_order_only
from . import reference

_GRID = (
    "Tensor delta, Tensor offset, float n, bool preserve_zero, bool clamped, bool pow2_scale, int? axis, str rounding"
)
NOISES = ("none", "uniform")

define(
    f"gemmlowp(Tensor x, {_GRID}, Tensor? noise) -> Tensor",
    reference.forward,
    lambda x, *_: torch.empty_like(x),
)
define(
    f"gemmlowp_backward(Tensor grad, Tensor x, {_GRID}) -> Tensor",
    reference.backward,
    lambda grad, x, *_: torch.empty_like(x),
)


def _save(ctx, inputs, output):
    x, delta, offset, *ctx.options, _ = inputs
    ctx.save_for_backward(x, delta, offset)


def _backward(ctx, grad):
    dx = torch.ops.qexp.gemmlowp_backward(grad, *ctx.saved_tensors, *ctx.options)
    return dx, None, None, None, None, None, None, None, None, None


differentiable("gemmlowp", _save, _backward)
first_order_only("gemmlowp_backward")


def gemmlowp(
    x: Tensor,
    delta: Tensor,
    offset: Tensor,
    levels: int,
    *,
    axis: int | None = None,
    preserve_zero: bool = True,
    clamp_zero_point: bool = True,
    pow2_scale: bool = False,
    noise: str = "none",
    rounding: str = "half_even",
    generator: torch.Generator | None = None,
) -> Tensor:
    """Returns `x` quantized to `levels + 1` values spread over `[offset, offset + delta]`.

    With `s = delta / levels`: `q = round(clip(x / s + z, 0, levels))`, `z = round(-offset / s)`, result `(q - z) s`;
    or, zero not preserved, `q = round(clip((x - offset) / s, 0, levels))`, result `q s + offset`. Where `delta <= 0`
    (a constant channel) `x` passes unchanged. The gradient is 1 where the code before rounding lies in [0, levels].

    Args:
        x: Any shape and layout.
        delta: Width of the range, one element or one a channel.
        offset: Lower end of the range, one element or one a channel.
        levels: `2**bits - 1`.
        axis: The channel axis of `x`; None = the whole tensor.
        preserve_zero: Zero gets a code of its own.
        clamp_zero_point: Extend the range to contain 0 first, so that `z` is itself a code.
        pow2_scale: Round `s` up to a power of two.
        noise: `uniform` adds U(-0.5, 0.5) before the clip.
        rounding: See `round_to`; `stochastic` and `noise="uniform"` exclude each other.
        generator: Where the noise is drawn from.

    Source: Banner et al. 2019, arXiv 1810.05723 (code); Jacob et al. 2018, arXiv 1712.05877.
    """
    check.tensor("x", x)
    axis = check.channel_axis(axis, x)
    delta = check.parameter("delta", delta, x, axis)
    offset = check.parameter("offset", offset, x, axis)
    n = check.levels("levels", levels)
    if noise not in NOISES:
        raise KernelError(f"noise: got {noise!r}, expected one of {', '.join(NOISES)}")
    if noise == "uniform" and rounding == "stochastic":
        raise KernelError("noise: 'uniform' and rounding='stochastic' add noise twice, choose one")
    u = check.noise(rounding, x, generator) if noise == "none" else check.noise("stochastic", x, generator)
    check.rounding(rounding)
    return torch.ops.qexp.gemmlowp(x, delta, offset, n, preserve_zero, clamp_zero_point, pow2_scale, axis, rounding, u)
