"""Operations whose result depends on sums over many codes: norms, vectors of length 1 and softmax, in whole numbers."""

from __future__ import annotations

from dataclasses import dataclass

from qexp.integer.op import Ints, Op


@dataclass(frozen=True, kw_only=True)
class Normalize(Op):
    """Mean 0 and variance 1 in each of `groups` equal runs of an image's codes, then a sign and a summand for each channel.

    For a run of n codes with sum S: `w = n sum q^2 - S^2`, `t = floor(sqrt(w 4^finer + eps))`,
    `y = sign * floor((n q - S) 2^(finer + fraction) / t + 1/2) + bias`; the quotient is 0 where t is 0. The scale of the input cancels,
    except in `eps`; a zero point cancels, too.

    Attributes:
        groups: Number of runs.
        finer: Bits by which the root is finer than a whole number.
        fraction: Bits of the quotient behind the point.
        eps: The layer's summand of the variance, in units of w 4^finer.
        sign, bias: One number or one per channel, which lie along `axis`.
        axis: Dimension of the channels, without the batch.
    """

    kind = "normalize"
    groups: int
    finer: int
    fraction: int
    eps: int
    sign: Ints
    bias: Ints
    axis: int


@dataclass(frozen=True, kw_only=True)
class Length(Op):
    """Lengths of vectors: `y = floor(sqrt(sum (q - zero)^2 4^finer))` over the dimensions `axes`, which have one entry afterwards.

    Attributes:
        axes: Dimensions of the sum, without the batch.
        zero: The code of zero.
        finer: Bits by which the root is finer than a whole number.
    """

    kind = "length"
    axes: tuple[int, ...]
    zero: Ints
    finer: int


@dataclass(frozen=True, kw_only=True)
class UnitLength(Op):
    """Vectors along a dimension, divided by their length.

    With `w = sum (q - zero)^2` and `t = max(floor(sqrt(w 4^finer)), least)`:
    `y = floor((q - zero) 2^(finer + fraction) / t + 1/2)`. The scale of the input cancels, except in `least`.

    Attributes:
        axis: Dimension of the vectors, without the batch.
        zero: The code of zero.
        finer: Bits by which the root is finer than a whole number.
        fraction: Bits of the quotient behind the point.
        least: The least length, in units of `2^-finer`; at least 1.
    """

    kind = "unit_length"
    axis: int
    zero: Ints
    finer: int
    fraction: int
    least: int


@dataclass(frozen=True, kw_only=True)
class Softmax(Op):
    """Shares of exponentials along a dimension: `y = floor((E 2^(fraction + 1) + S) / (2 S))` with `E = table[max - q]`, `S = sum E`.

    Attributes:
        axis: Dimension of the sum, without the batch.
        table: `exp(-k unit)` of every distance k from the greatest code, as whole multiples of one step.
        fraction: Bits of the result behind the point.
    """

    kind = "softmax"
    axis: int
    table: Ints
    fraction: int
