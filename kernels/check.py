"""Argument checks shared by the operators; every message names the argument, the value and the allowed values."""

import math
from numbers import Real

import torch
from torch import Tensor

from .errors import KernelError

ROUNDINGS = ("half_even", "half_up", "half_away", "floor", "trunc", "stochastic")
_NUMBERS = (float, int)  # asked first, since a question to an abstract class takes longer
FLOATS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


def tensor(name: str, x: Tensor) -> None:
    """Raises if `x` is not a real floating-point tensor."""
    if not isinstance(x, Tensor):
        raise KernelError(f"{name}: got {type(x).__name__}, expected a tensor")
    if x.dtype not in FLOATS:
        raise KernelError(f"{name}: got dtype {x.dtype}, expected one of {', '.join(map(str, FLOATS))}")


def precision(x: Tensor, p: Tensor) -> torch.dtype:
    """Returns the dtype for a parameter of `x`: float32, or float64 if both are float64."""
    return torch.float64 if x.dtype == p.dtype == torch.float64 else torch.float32


def channel_axis(axis: int | None, x: Tensor) -> int | None:
    """Returns `axis` counted from the front."""
    if axis is None:
        return None
    if not -x.dim() <= axis < x.dim():
        raise KernelError(f"axis: got {axis}, but x has {x.dim()} dimensions")
    return axis % x.dim()


def parameter(name: str, p: Tensor, x: Tensor, axis: int | None, *, positive: bool = False) -> Tensor:
    """Returns `p` in float32 (float64 where `x` and `p` are) after checking that it fits `x`.

    Values are checked on the CPU only: on an accelerator the check would wait for the device. There the kernels return NaN for a scale
    that is not positive and finite.
    """
    if not isinstance(p, Tensor):
        raise KernelError(f"{name}: got {type(p).__name__}, expected a tensor with 1 element or one per channel")
    if (
        type(p) in (Tensor, torch.nn.Parameter)
        and p.numel() == 1
        and p.dtype == torch.float32
        and p.is_cpu
        and x.is_cpu
        and not torch.compiler.is_compiling()
        and (-math.inf, 0.0)[positive] < p.item() < math.inf
    ):
        return p  # one sound number on the CPU, by far the most frequent case in training; anything else is looked at below
    if p.device != x.device:
        raise KernelError(f"{name}: is on {p.device}, but x is on {x.device}")
    channels = 1 if axis is None else x.shape[axis]
    if p.numel() not in (1, channels):
        allowed = "1 (axis is None)" if axis is None else f"1 or {channels} (the size of x along axis {axis})"
        raise KernelError(f"{name}: got {p.numel()} elements, expected {allowed}")
    if p.dtype != torch.float32:
        p = p.to(precision(x, p))
    if p.device.type == "cpu" and not torch.compiler.is_compiling() and type(p) in (Tensor, torch.nn.Parameter):
        low, high = (
            (p.item(),) * 2 if p.numel() == 1 else (v.item() for v in p.detach().aminmax()) if p.numel() else (1, 1)
        )
        if not (math.isfinite(low) and math.isfinite(high)) or (positive and low <= 0):
            raise KernelError(
                f"{name}: values reach from {low} to {high}, expected {'positive ' * positive}finite numbers"
            )
    return p


def limits(
    qmin: float | Tensor, qmax: float | Tensor, x: Tensor, axis: int | None
) -> tuple[float, float, Tensor | None]:
    """Returns `(qmin, qmax, None)` for numbers, `(0, 0, [2, C])` where the channels differ."""
    if (type(qmin) in _NUMBERS or isinstance(qmin, Real)) and (type(qmax) in _NUMBERS or isinstance(qmax, Real)):
        if not qmin <= qmax:
            raise KernelError(f"qmin, qmax: got {qmin} and {qmax}, expected qmin <= qmax")
        return float(qmin), float(qmax), None
    low, high = (
        parameter(name, q if isinstance(q, Tensor) else torch.tensor(float(q), device=x.device), x, axis).reshape(-1)
        for name, q in (("qmin", qmin), ("qmax", qmax))
    )
    return 0.0, 0.0, torch.stack(torch.broadcast_tensors(low, high))


def rounding(name: str) -> None:
    """Raises for an unknown rounding mode."""
    if name not in ROUNDINGS:
        raise KernelError(f"rounding: got {name!r}, expected one of {', '.join(ROUNDINGS)}")


def noise(mode: str, x: Tensor, generator: torch.Generator | None) -> Tensor | None:
    """Returns the uniform numbers in [0, 1) that stochastic rounding adds, shaped and laid out as `x`; else None."""
    rounding(mode)
    if mode != "stochastic":
        return None
    return torch.empty_like(x, dtype=torch.float32, requires_grad=False).uniform_(0, 1, generator=generator)


def levels(name: str, value: float) -> float:
    """Returns a number of steps as a float; at least one."""
    if not (isinstance(value, Real) and value >= 1 and math.isfinite(value)):
        raise KernelError(f"{name}: got {value!r}, expected a number of steps of at least 1")
    return float(value)
