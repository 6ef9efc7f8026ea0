"""Two's complement fixed point with rounded products: convolution and linear layers."""

import torch
from torch import Tensor

from .. import check
from ..errors import KernelError
from ..library import define, differentiable
from . import reference

ACCUMULATE = ("per_op", "per_add")


def _fake(x, weight, bias, stride, padding, dilation, groups, *_):
    size = [
        (x.shape[d + 2] + 2 * padding[d] - dilation[d] * (weight.shape[d + 2] - 1) - 1) // stride[d] + 1 for d in (0, 1)
    ]
    out = x.new_empty((x.shape[0], weight.shape[0], *size))
    return out.contiguous(memory_format=torch.channels_last) if reference.channels_last(x) else out


define(
    "fixed_point_conv2d(Tensor x, Tensor weight, Tensor? bias, int[] stride, int[] padding, int[] dilation, int groups,"
    " int bits, int fraction_bits, str accumulate, str rounding) -> Tensor",
    reference.forward,
    _fake,
)


def _save(ctx, inputs, output):
    x, weight, bias, ctx.stride, ctx.padding, ctx.dilation, ctx.groups, *_ = inputs
    ctx.bias_size = None if bias is None else list(bias.shape)
    ctx.save_for_backward(x, weight)


def _backward(ctx, grad):
    x, weight = ctx.saved_tensors
    mask = [*ctx.needs_input_grad[:2], ctx.bias_size is not None and ctx.needs_input_grad[2]]
    gradients = torch.ops.aten.convolution_backward(
        grad, x, weight, ctx.bias_size, ctx.stride, ctx.padding, ctx.dilation, False, [0, 0], ctx.groups, mask
    )
    return *gradients, None, None, None, None, None, None, None, None


_run = differentiable("fixed_point_conv2d", _save, _backward)


def _pair(name: str, value: int | tuple[int, int], least: int) -> list[int]:
    pair = [value, value] if isinstance(value, int) else list(value)
    if len(pair) != 2 or min(pair) < least:
        raise KernelError(f"{name}: got {value}, expected one or two integers of at least {least}")
    return pair


def fixed_point_conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    bits: int,
    fraction_bits: int,
    stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, int] = 0,
    dilation: int | tuple[int, int] = 1,
    groups: int = 1,
    accumulate: str = "per_op",
    rounding: str = "half_even",
) -> Tensor:
    """Returns the convolution in which each product is rounded and saturated to the format of the output.

    With `Q(v) = clip(round(v 2**f), -2**(bits-1), 2**(bits-1) - 1) / 2**f`: `Q(Q(sum_k Q(w_k x_k)) + bias)`
    (`per_op`), or with every partial sum quantized too, in the order input channel, row, column (`per_add`). Products
    are exact before they are rounded once, the sum of rounded products is exact. No tensor of products exists. The
    gradient is that of the float convolution. Infinities saturate; NaN makes every output that depends on it NaN.

    Args:
        x: [N, Cin, H, W], taken in float32.
        weight: [Cout, Cin / groups, kh, kw].
        bias: [Cout] or None (no last addition).
        bits: Width of the output format, 2..24.
        fraction_bits: `f`; may be negative or above `bits`.
        stride: Stride, as in `torch.nn.functional.conv2d`, like `padding` (zeros), `dilation` and `groups`.
        accumulate: `per_op` or `per_add`.
        rounding: See `round_to`; not `stochastic`.
    """
    for name, t in (("x", x), ("weight", weight), ("bias", bias)):
        if t is None and name == "bias":
            continue
        check.tensor(name, t)
        if t.device != x.device:
            raise KernelError(f"{name}: is on {t.device}, but x is on {x.device}")
        if t.dtype != x.dtype:
            raise KernelError(f"{name}: got dtype {t.dtype}, expected that of x, {x.dtype}")
    if x.dim() != 4 or weight.dim() != 4 or groups < 1 or x.shape[1] != weight.shape[1] * groups:
        raise KernelError(
            f"weight: got {tuple(weight.shape)} with groups={groups} for x {tuple(x.shape)}, expected x [N, Cin, H, W] "
            "and weight [Cout, Cin / groups, kh, kw]"
        )
    if weight.shape[0] % groups or (bias is not None and bias.shape != weight.shape[:1]):
        got = "none" if bias is None else tuple(bias.shape)
        raise KernelError(f"bias, groups: got {got} and {groups} for {weight.shape[0]} output channels")
    if not 2 <= bits <= 24:
        raise KernelError(f"bits: got {bits}, expected 2 to 24")
    if not -100 <= fraction_bits <= 100:
        raise KernelError(f"fraction_bits: got {fraction_bits}, expected -100 to 100")
    if accumulate not in ACCUMULATE:
        raise KernelError(f"accumulate: got {accumulate!r}, expected one of {', '.join(ACCUMULATE)}")
    check.rounding(rounding)
    if rounding == "stochastic":
        raise KernelError("rounding: 'stochastic' is not supported here, expected a deterministic mode")
    stride, padding, dilation = _pair("stride", stride, 1), _pair("padding", padding, 0), _pair("dilation", dilation, 1)
    for d in (0, 1):
        reach = dilation[d] * (weight.shape[d + 2] - 1) + 1
        if x.shape[d + 2] + 2 * padding[d] < reach:
            raise KernelError(f"x: {tuple(x.shape)} padded by {padding} is smaller than the kernel's reach of {reach}")
    return _run(x, weight, bias, stride, padding, dilation, groups, bits, fraction_bits, accumulate, rounding)


def fixed_point_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    bits: int,
    fraction_bits: int,
    accumulate: str = "per_op",
    rounding: str = "half_even",
) -> Tensor:
    """Returns the linear layer [..., in] -> [..., out] computed like a 1x1 convolution by `fixed_point_conv2d`."""
    check.tensor("x", x)
    if x.dim() < 1 or weight.dim() != 2 or x.shape[-1] != weight.shape[1]:
        raise KernelError(f"weight: got {tuple(weight.shape)} for x {tuple(x.shape)}, expected [out, in]")
    y = fixed_point_conv2d(
        x.reshape(-1, x.shape[-1], 1, 1),
        weight[:, :, None, None],
        bias,
        bits=bits,
        fraction_bits=fraction_bits,
        accumulate=accumulate,
        rounding=rounding,
    )
    return y.reshape(*x.shape[:-1], weight.shape[0])
