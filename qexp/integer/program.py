"""The integer program: a short list of typed operations over tensors of integers, and the file that holds it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qexp.integer.arithmetic import round_reals, width
from qexp.integer.moves import Concat, Flatten, Pad, Permute, Reshape, Slice, StridedPad
from qexp.integer.op import Ints, Op
from qexp.integer.products import Affine, Divide, MatMul, Multiply, Resample
from qexp.integer.statistics import Length, Normalize, Softmax, UnitLength

VERSION = 2  # of the format; a program of another one is refused


@dataclass(frozen=True)
class TensorSpec:
    """The meaning of a tensor of integers: the real value of code q is `(q - zero_point) * unit`.

    Attributes:
        name: Unique in the program.
        shape: Without the batch: `(C, H, W)` or `(features,)`.
        low, high: Bounds of the codes for any input.
        unit: Real value of one step, one number or one per channel.
        zero_point: Code of zero, one number or one per channel.
        axis: Dimension of the channels, without the batch: 0 in maps `(C, H, W)`, the last where channels come last.
    """

    name: str
    shape: tuple[int, ...]
    low: int
    high: int
    unit: NDArray[np.float64]
    zero_point: Ints
    axis: int = 0

    @property
    def bits(self) -> int:
        """Bits that hold every code."""
        return width(self.low, self.high)


@dataclass(frozen=True, kw_only=True)
class Conv(Op):
    """`acc = sum (x - zero) * weight`, result `(acc << align) + bias`; beyond the border x is `zero`.

    The accumulator holds products alone; the bias joins after the sum, in the wider word that the next requantization reads anyway.

    Attributes:
        weight: [O, I / groups, kh, kw].
        bias: [O], in units of the result.
        zero: Zero point of the input, one number or one per channel.
        align: Bits of the bias below the accumulator's last bit, so that its rounding error is negligible.
        unit: Special unit of the layer, such as `{"name": "winograd", ...}`; see `qexp.integer.hardware`.
    """

    kind = "conv"
    weight: Ints
    bias: Ints
    zero: Ints
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1
    align: int = 0
    unit: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Linear(Op):
    """`acc = sum (x - zero) * weight`, result `(acc << align) + bias`, weight [O, I], over the last dimension of the input."""

    kind = "linear"
    weight: Ints
    bias: Ints
    zero: Ints
    align: int = 0
    unit: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Requantize(Op):
    """`y = clip(round(((x - zero) * multiplier + addend) / 2^shift), low, high)`: another grid; a multiplier of 1 is a plain shift.

    The addend holds the new zero point (`zero_point << shift`), or a batch norm's integer summand. All four are one number or one per
    channel, which lie along the dimension `axis`.
    """

    kind = "requantize"
    multiplier: Ints
    addend: Ints
    shift: Ints
    zero: Ints
    rounding: str
    low: int
    high: int
    axis: int = 0


@dataclass(frozen=True, kw_only=True)
class Clamp(Op):
    """`y = clip(x, low, high)`: a ReLU or ReLU6 in codes; limits are one number or one per channel along `axis`."""

    kind = "clamp"
    low: Ints
    high: Ints
    axis: int = 0


@dataclass(frozen=True, kw_only=True)
class Add(Op):
    """`y = sum_i (x_i - zero_i) << shift_i`: operands on grids that differ by powers of two."""

    kind = "add"
    zeros: Ints
    shifts: Ints


@dataclass(frozen=True, kw_only=True)
class MaxPool(Op):
    """The greatest code of each of `size` windows; positions beyond the border are ignored."""

    kind = "max_pool"
    window: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    size: tuple[int, int]


@dataclass(frozen=True, kw_only=True)
class SumPool(Op):
    """`y = sum (x - zero)` over each window: an average whose division is left to the next `Requantize`, which rounds once."""

    kind = "sum_pool"
    window: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    zero: Ints


@dataclass(frozen=True, kw_only=True)
class Lookup(Op):
    """`y = table[x - low]`: any function of one code; a table [C, codes] has one row per channel along `axis`."""

    kind = "lookup"
    table: Ints
    low: int
    axis: int = 0


OPS: dict[str, type[Op]] = {
    c.kind: c
    for c in (
        *(
            Conv,
            Linear,
            Requantize,
            Clamp,
            Add,
            Affine,
            Multiply,
            Divide,
            MatMul,
            MaxPool,
            SumPool,
            Lookup,
            Resample,
            Normalize,
            Length,
            UnitLength,
            Softmax,
        ),
        *(Concat, Flatten, StridedPad, Reshape, Permute, Slice, Pad),
    )
}


@dataclass
class IntegerProgram:
    """A network as integers: from codes of images to codes of scores.

    Attributes:
        tensors: Tensors by name, in order of creation; the first is the input.
        ops: Operations in order of execution.
        input, output: Names of tensors.
        rounding: How `encode` rounds.
        about: Free text: model, recipe, weights.
    """

    tensors: dict[str, TensorSpec] = field(default_factory=dict)
    ops: list[Op] = field(default_factory=list)
    input: str = ""
    output: str = ""
    rounding: str = "half_even"
    about: dict[str, Any] = field(default_factory=dict)

    def encode(self, images: NDArray[np.float32]) -> Ints:
        """Returns the codes of float images `[N, C, H, W]`: `clip(round(x / unit + zero_point), low, high)`, in float32 as simulated."""
        spec = self.tensors[self.input]
        unit, zero = (channels(a, images.ndim).astype(np.float32) for a in (spec.unit, spec.zero_point))
        x = np.clip(images.astype(np.float32) / unit + zero, np.float32(spec.low), np.float32(spec.high))
        return round_reals(x, self.rounding).astype(np.int64)

    def decode(self, codes: Ints, tensor: str | None = None) -> NDArray[np.float64]:
        """Returns the real values of a tensor's codes; by default those of the output."""
        spec = self.tensors[tensor or self.output]
        return (codes - channels(spec.zero_point, codes.ndim, spec.axis)) * channels(spec.unit, codes.ndim, spec.axis)

    def last_use(self) -> dict[str, int]:
        """Returns, for each tensor, the number of the last operation that reads it, so that executors can drop it."""
        return {name: i for i, op in enumerate(self.ops) for name in op.inputs}

    def arrays(self) -> Iterator[tuple[int, str, Ints]]:
        """Yields number of the operation, field and array of every constant."""
        for i, op in enumerate(self.ops):
            for f in fields(op):
                value = getattr(op, f.name)
                if isinstance(value, np.ndarray):
                    yield i, f.name, value


def channels(values: NDArray, ndim: int, axis: int = 0) -> NDArray:
    """Returns one value, or one per channel, in the shape that broadcasts against `[N, ...]` of `ndim` dimensions.

    Args:
        values: One number, or one per channel.
        ndim: Dimensions of the other operand, the batch included.
        axis: Dimension of the channels, the batch not counted.

    >>> channels(np.arange(3), 4).shape, channels(np.arange(3), 4, 2).shape
    ((1, 3, 1, 1), (1, 1, 1, 3))
    """
    values = np.asarray(values)
    return (
        values.reshape([1] * (axis + 1) + [-1] + [1] * (ndim - axis - 2))
        if values.size > 1
        else values.reshape([1] * ndim)
    )
