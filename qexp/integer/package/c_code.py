"""The C code of one operation while it is written: its constant arrays, and the places of its tensors."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from qexp.integer.op import Ints


@dataclass
class Code:
    """An operation's tensors in C, and the arrays that it adds.

    Attributes:
        number: Number of the operation, part of its arrays' names.
        xs, y: Addresses of its inputs and of its result.
        sources, result: Their shapes, without the batch.
        arrays: Declarations of constant arrays.
    """

    number: int
    xs: list[str]
    y: str
    sources: list[tuple[int, ...]]
    result: tuple[int, ...]
    arrays: list[str] = field(default_factory=list)

    def array(self, kind: str, name: str, values: NDArray) -> str:
        """Adds a constant array and returns its name."""
        self.arrays.append(f"static const {kind} {name}{self.number}[] = {{{numbers(values)}}};")
        return f"{name}{self.number}"

    def constant(self, name: str, values: Ints) -> str:
        """Adds a constant array of 64-bit integers and returns its name and length, separated by a comma."""
        return f"{self.array('q64', name, np.ravel(values))}, {np.size(values)}"

    def run(self, axis: int) -> str:
        """Returns the result's shape as `[outer][channels][inner]`, with the channels along `axis`."""
        outer, inner = math.prod(self.result[:axis]), math.prod(self.result[axis + 1 :])
        return f"(qx_run){{{outer}, {self.result[axis]}, {inner}}}"


def shape(dims: tuple[int, ...]) -> str:
    """Returns maps `(C, H, W)`, or features `(C,)`, as a C value."""
    c, h, w = dims if len(dims) == 3 else (dims[0], 1, 1)
    return f"(qx_shape){{{c}, {h}, {w}}}"


def numbers(values: Iterable[int]) -> str:
    """Returns whole numbers separated by commas; of an array, all of them in C order."""
    if isinstance(values, np.ndarray):  # millions of weights: one call converts them
        return ", ".join(map(str, values.ravel().tolist()))
    return ", ".join(str(int(v)) for v in values)
