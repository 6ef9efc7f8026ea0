"""The CAQ unit: inputs are shifted by the exponents of their weights and added; there is no multiplier.

Source: the shift engine of TF2-Engine.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qexp.errors import QexpError
from qexp.integer.program import Clamp, Conv, IntegerProgram, Linear, Requantize, channels
from qexp.integer.register import taps

Ints = NDArray[np.int64]
NEGATIVE = ("exact", "right_shift", "zero", "legacy")


def unit(program: IntegerProgram, op: Conv | Linear, options: dict[str, Any]) -> dict[str, Any] | None:
    """Returns the unit of a layer whose weights and steps are powers of two; None for other layers.

    Args:
        program: The program.
        op: The layer.
        options: `inflation`, the bits the register has below the last one of the codes the result becomes; `negative`, what a shift
            below zero does: `exact` keeps its bits, `right_shift` drops them (floor), `zero` drops the term, `legacy` shifts by 0.
    """
    how = {"inflation": 15, "negative": "right_shift"} | options
    if set(how) != {"inflation", "negative"} or how["negative"] not in NEGATIVE:
        raise QexpError(f"shift: {options} is not allowed; use inflation and negative ({', '.join(NEGATIVE)})")
    own, after = program.tensors[op.output].unit * 2.0**op.align, program.tensors[_settled(program, op)].unit
    powers = np.abs(op.weight)
    if (powers & (powers - 1)).any() or not all((np.frexp(u)[0] == 0.5).all() for u in (own, after)):
        return None
    return {"negative": how["negative"], "drop": drop(own, after, how["inflation"], len(op.weight))}


def _settled(program: IntegerProgram, op: Conv | Linear) -> str:
    """Returns the tensor of codes of a layer's result, behind a ReLU if there is one."""
    name = op.output
    for later in program.ops:
        if name in later.inputs and isinstance(later, Clamp | Requantize):
            name = later.output
            if isinstance(later, Requantize):
                return name
    return op.output


def drop(own: NDArray, after: NDArray, inflation: int, outputs: int) -> list[int]:
    """Returns, for each output, how many bits of the program's sums lie below the register: the shift of its weight 1, negated."""
    bits = np.log2(after) - inflation - np.log2(own)
    return np.broadcast_to(np.rint(bits), (outputs,)).astype(int).tolist()


def sums(op: Conv | Linear, x: Ints, register: Any) -> Ints:
    """Returns `sum s * (x << shift)` with the shift of each weight, in the order of the products, as the register holds it."""
    how = op.unit
    below = np.zeros(len(op.weight), np.int64) if how["negative"] == "exact" else np.array(how["drop"], np.int64)
    exponent = np.round(np.log2(np.maximum(np.abs(op.weight), 1))).astype(np.int64)
    exponent = np.moveaxis(exponent.reshape(len(op.weight), -1), 1, 0) - below  # [taps, O], the order of `taps`
    sign = np.moveaxis(np.sign(op.weight).reshape(len(op.weight), -1), 1, 0)
    seen = taps(replace(op, weight=np.ones_like(op.weight)), x)
    ndim = 4 if isinstance(op, Conv) else 2
    terms = (
        channels(s, ndim) * _shifted(patch, channels(e, ndim), how["negative"])
        for s, e, patch in zip(sign, exponent, seen)
    )
    total = register.sum(op.layer, terms)
    below = channels(below, ndim)
    total = np.where(below >= 0, total << np.maximum(below, 0), total >> np.maximum(-below, 0))
    return (total << op.align) + channels(op.bias, ndim)


def _shifted(x: Ints, shift: Ints, negative: str) -> Ints:
    """Returns `x << shift`; the option `negative` names the treatment of negative shifts."""
    up = x << np.maximum(shift, 0)
    if negative == "right_shift":
        return np.where(shift >= 0, up, x >> np.minimum(np.maximum(-shift, 0), 62))
    if negative == "zero":
        return np.where(shift >= 0, up, 0)
    return up
