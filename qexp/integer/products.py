"""Operations that combine or mix codes of activations: products of two tensors, multiples, weighted sums of neighbours."""

from __future__ import annotations

from dataclasses import dataclass

from qexp.integer.op import Ints, Op


@dataclass(frozen=True, kw_only=True)
class Multiply(Op):
    """`y = (a - zeros[0]) (b - zeros[1])`, number by number; dimensions of size 1 are repeated."""

    kind = "multiply"
    zeros: Ints


@dataclass(frozen=True, kw_only=True)
class Divide(Op):
    """`y = floor((a - zeros[0]) 2^fraction / (b - zeros[1]) + 1/2)`; 0 where the divisor is 0.

    Dimensions of size 1 of the divisor are repeated.
    """

    kind = "divide"
    zeros: Ints
    fraction: int


@dataclass(frozen=True, kw_only=True)
class MatMul(Op):
    """`y = (a - zeros[0]) @ (b - zeros[1])` over the last two dimensions: [..., M, K] times [..., K, L]."""

    kind = "matmul"
    zeros: Ints


@dataclass(frozen=True, kw_only=True)
class Affine(Op):
    """`y = ((x - zero) factor << shift) + bias`, exact: a constant multiple (whose size is in the unit) and a constant summand.

    Attributes:
        factor, bias: Numbers that spread over the tensor without its batch: one, `[C, 1, 1]`, or of the tensor's shape.
        zero: Zero point of the input, one number or one per channel along `axis`.
    """

    kind = "affine"
    factor: Ints
    bias: Ints
    zero: Ints
    shift: int = 0
    axis: int = 0


@dataclass(frozen=True, kw_only=True)
class Resample(Op):
    """Other sizes of maps: a row of the result is a sum of `rows[i]` times `row_weights[i]`, and so are columns.

    `y[i, j] = sum_kl row_weights[i, k] column_weights[j, l] (x[rows[i, k], columns[j, l]] - zero)`. Copies (nearest neighbours) have
    one row each, weights of 1 and a `zero` of 0.

    Attributes:
        rows, row_weights: [heights, taps].
        columns, column_weights: [widths, taps].
        zero: Zero point of the input, one number or one per channel.
    """

    kind = "resample"
    rows: Ints
    row_weights: Ints
    columns: Ints
    column_weights: Ints
    zero: Ints

    @property
    def copies(self) -> bool:
        """Whether each number is a copy of one of the source's."""
        return self.rows.shape[1] == self.columns.shape[1] == 1
