"""Maps whole numbers to another grid: one product, one sum, one rounding and one clip, in float64."""

import math

import torch
from torch import Tensor

from .. import check
from ..errors import KernelError
from ..library import constant, define
from . import reference

OUTPUTS = (torch.float32, torch.float64, torch.uint8, torch.int8)

define(
    "rescale(Tensor x, Tensor factor, Tensor summand, float low, float high, str rounding, ScalarType dtype) -> Tensor",
    reference.forward,
    lambda x, factor, summand, low, high, rounding, dtype: torch.empty_like(x, dtype=dtype),
)
constant("rescale")


def rescale(
    x: Tensor,
    factor: Tensor,
    summand: Tensor,
    low: float,
    high: float,
    *,
    rounding: str = "half_even",
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Returns `clip(round(x * factor + summand), low, high)`, computed in float64; no gradient.

    Args:
        x: `[N, C, ...]`, float32 or float64.
        factor: One element or one per channel, taken in float64.
        summand: One element or one per channel, taken in float64.
        low: Least result.
        high: Greatest result.
        rounding: See `round_to`; not `stochastic`.
        dtype: Dtype of the result: float32, float64, uint8 or int8, which must hold `low` and `high`.

    Raises:
        KernelError: An argument does not fit `x`.
    """
    if not isinstance(x, Tensor) or x.dtype not in (torch.float32, torch.float64):
        raise KernelError(f"x: got {getattr(x, 'dtype', type(x).__name__)}, expected float32 or float64")
    channels = x.shape[1] if x.dim() > 1 else 1
    for name, p in (("factor", factor), ("summand", summand)):
        if p.numel() not in (1, channels):
            raise KernelError(f"{name}: got {p.numel()} elements, expected 1 or {channels}, one per channel of x")
        if p.device != x.device:
            raise KernelError(f"{name}: is on {p.device}, but x is on {x.device}")
    check.rounding(rounding)
    if rounding == "stochastic":
        raise KernelError("rounding: got 'stochastic', expected one that needs no noise")
    if dtype not in OUTPUTS:
        raise KernelError(f"dtype: got {dtype}, expected one of {', '.join(map(str, OUTPUTS))}")
    ends = (-math.inf, math.inf) if dtype.is_floating_point else (torch.iinfo(dtype).min, torch.iinfo(dtype).max)
    if not ends[0] <= low <= high <= ends[1]:
        raise KernelError(f"low, high: got {low} and {high}, expected low <= high that {dtype} can hold")
    return torch.ops.qexp.rescale(x, factor.double(), summand.double(), float(low), float(high), rounding, dtype)
