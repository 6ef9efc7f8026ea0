"""The fixed-point unit: rounds and saturates every product, and optionally every sum, to one word."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from qexp.integer.arithmetic import shift_round
from qexp.integer.program import Conv, Linear, channels
from qexp.integer.register import taps

Ints = NDArray[np.int64]


def sums(op: Conv | Linear, x: Ints, register: Any) -> Ints:
    """Returns codes of the result's word: `Q(Q(sum_k Q(w_k x_k)) + b)` (`per_op`), every partial sum a word too (`per_add`).

    `op.unit` holds `accumulate`, the `bits` of the word, `shift` (bits a product has below the word's last one) and `rounding`; the
    bias counts in `2^-align` of that last bit.
    """
    how = op.unit
    low, high = -(1 << (how["bits"] - 1)), (1 << (how["bits"] - 1)) - 1
    each = how["accumulate"] == "per_add"

    def word(values: Ints, shift: int) -> Ints:
        values = shift_round(values, shift, how["rounding"]) if shift >= 0 else values << -shift
        register.overflows[op.layer] = register.overflows.get(op.layer, 0) + int(
            ((values < low) | (values > high)).sum()
        )
        return values.clip(low, high)

    total: Ints | int = 0
    for term in taps(op, x):
        total = total + word(term, how["shift"])
        total = word(total, 0) if each else total
    total = word(np.asarray(total), 0)
    return word((total << op.align) + channels(op.bias, total.ndim), op.align) if how["bias"] else total
