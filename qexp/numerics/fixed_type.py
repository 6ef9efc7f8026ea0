"""Integer constants `<bit, intbit>`: real factors as two's complement numbers with a fixed point, and arithmetic with them."""

from __future__ import annotations

from typing import Literal

import torch
from qexp_kernels import round_to
from torch import Tensor

from qexp.errors import QexpError

FORMS = ("saturate", "split")


def fixed_type(x: Tensor | float, bit: int, intbit: int, form: Literal["saturate", "split"] = "saturate") -> Tensor:
    """Returns `x` as integers (int64) that count `2^-(bit - intbit)`; ties to even.

    `saturate`: `clip(round(x 2^f), -2^(bit-1), 2^(bit-1) - 1)`. `split`: the nearest integer and the rest are rounded separately, and
    only the integer is clipped, so that values near its end lose up to 1 and large negative values fall outside the type.

    Args:
        x: Real numbers of any shape.
        bit: Width, sign included.
        intbit: Integer bits, sign included; f = bit - intbit bits are fractional.
        form: `saturate`, or `split` as in PACT-Quantization.

    >>> [int(fixed_type(v, 16, 6)) for v in (3.14159, 0.0007, 40.2, 31.9)]
    [3217, 1, 32767, 32666]
    >>> [int(fixed_type(v, 16, 6, "split")) for v in (3.14159, 0.0007, 40.2, 31.9)]
    [3217, 1, 31949, 31642]
    """
    f = fraction_bits(bit, intbit)
    if form not in FORMS:
        raise QexpError(f"fixed_type: form={form!r} is not allowed; use {', '.join(FORMS)}")
    x = torch.as_tensor(x, dtype=torch.float64)
    if not bool(torch.isfinite(x).all()):
        raise QexpError(f"fixed_type<{bit},{intbit}>: {int((~torch.isfinite(x)).sum())} constants are NaN or infinite")
    if form == "saturate":
        return torch.round(x * 2**f).clamp(-(2 ** (bit - 1)), 2 ** (bit - 1) - 1).long()
    whole = torch.round(x)
    rest = torch.round((x - whole) * 2**f)
    return (whole.clamp(-(2 ** (intbit - 1)), 2 ** (intbit - 1) - 1) * 2**f + rest).long()


def fraction_bits(bit: int, intbit: int) -> int:
    """Returns f = bit - intbit; raises unless the type exists and float64 holds its numbers exactly."""
    if isinstance(bit, bool) or isinstance(intbit, bool) or not (1 <= intbit <= bit <= 48):
        raise QexpError(f"<bit,intbit> = <{bit},{intbit}>; allowed are 1 <= intbit <= bit <= 48 (both count the sign)")
    return bit - intbit


def shifted(total: Tensor, f: int, rounding: str = "trunc") -> Tensor:
    """Returns `total / 2^f` rounded to whole numbers in float64; `trunc` rounds toward zero.

    Args:
        total: Integers in float64 or int64 below 2^53.
        f: Bits to drop.
        rounding: `trunc`, or the name of a quantizer's rounding.
    """
    return round_to(total.double() / 2**f, rounding)
