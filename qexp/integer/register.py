"""The register that sums a layer's products, and the order in which it adds them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from qexp.errors import QexpError
from qexp.integer.arithmetic import OVERFLOWS, limit
from qexp.integer.program import Conv, Linear

Ints = NDArray[np.int64]
POINTS = ("end", "each")


@dataclass
class Accumulator:
    """The register that sums the products of convolutions and linear layers.

    Attributes:
        bits: Width, sign included; 64 never overflows.
        overflow: `saturate` at the ends, or `wrap` around.
        point: Where the overflow happens: at the `end` of the sum, or at `each` addition, in the order input channel, kernel row, kernel
            column, starting at zero. (Wrapping gives the same result at either point.)
        overflows: Count of overflows so far, by layer: sums (`end`) or additions (`each`) that did not fit.
        widest: Bits that each layer's sums (`end`) or additions (`each`) would have needed.
    """

    bits: int = 64
    overflow: str = "saturate"
    point: str = "end"
    overflows: dict[str, int] = field(default_factory=dict)
    widest: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.overflow not in OVERFLOWS or self.point not in POINTS or not 2 <= self.bits <= 64:
            raise QexpError(
                f"accumulator of {self.bits} bits, overflow={self.overflow!r}, point={self.point!r} is not allowed; use 2..64 bits, "
                f"{' | '.join(OVERFLOWS)}, {' | '.join(POINTS)}"
            )

    def sum(self, layer: str, terms: Iterator[Ints]) -> Ints:
        """Returns the sum of terms, as the register adds them; a term is an array with one product per sum."""
        total: Ints | int = 0
        for term in terms:
            total = total + term
            if self.point == "each":
                total = self.held(layer, total)
        return total if self.point == "each" else self.held(layer, total)

    def held(self, layer: str, total: Ints) -> Ints:
        """Returns sums as the register holds them, and counts."""
        if total.size:
            most = max(int(total.max()), -int(total.min()) - 1, 0)
            self.widest[layer] = max(self.widest.get(layer, 0), most.bit_length() + 1)
        total, lost = limit(total, self.bits, self.overflow) if self.bits < 64 else (total, 0)
        self.overflows[layer] = self.overflows.get(layer, 0) + lost
        return total


def taps(op: Conv | Linear, x: Ints) -> Iterator[Ints]:
    """Yields the products of a layer, one term of its sums at a time: input channel, kernel row, kernel column."""
    if isinstance(op, Linear):
        for i in range(op.weight.shape[1]):
            yield x[..., i, None] * op.weight[:, i]
        return
    (ph, pw), (sh, sw), (dh, dw) = op.padding, op.stride, op.dilation
    x = np.pad(x, ((0, 0), (0, 0), (ph, ph), (pw, pw)))
    outputs, per, kh, kw = op.weight.shape
    height = (x.shape[2] - dh * (kh - 1) - 1) // sh + 1
    width = (x.shape[3] - dw * (kw - 1) - 1) // sw + 1
    for c in range(per):  # the c-th channel of each group, repeated for the group's outputs
        group = np.repeat(np.arange(op.groups) * per + c, outputs // op.groups)
        for r in range(kh):
            for s in range(kw):
                rows = slice(r * dh, r * dh + (height - 1) * sh + 1, sh)
                columns = slice(s * dw, s * dw + (width - 1) * sw + 1, sw)
                seen = x[:, c : c + 1, rows, columns] if op.groups == 1 else x[:, group, rows, columns]
                yield seen * op.weight[None, :, c, r, s, None, None]
