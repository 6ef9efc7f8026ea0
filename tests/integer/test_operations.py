"""Operations on channels along any dimension, products, other map sizes, norms, softmax: loops and published vectors."""

from __future__ import annotations

import math
from fractions import Fraction
from itertools import product

import numpy as np
import pytest

from qexp.integer.arithmetic import multiplier, requantized
from qexp.integer.moves import Concat, Pad, Permute, Reshape, Slice
from qexp.integer.op import Op
from qexp.integer.products import Affine, Divide, MatMul, Multiply, Resample
from qexp.integer.program import Clamp, IntegerProgram, Linear, Lookup, Requantize, TensorSpec
from qexp.integer.reference import Reference
from qexp.integer.reference_statistics import root
from qexp.integer.statistics import Length, Normalize, Softmax, UnitLength
from tests.integer.test_executors import ZERO, both, single, whole

NAMES = {"layer": "l", "inputs": ("x",), "output": "y"}
X = np.arange(-60, 60).reshape(2, 3, 4, 5) * 7 % 97 - 40


@pytest.mark.parametrize(
    ("op", "expected"),
    [
        (Reshape(**NAMES, shape=(2, 6, 5)), lambda x: x.reshape(2, 2, 6, 5)),
        (Permute(**NAMES, order=(1, 2, 0)), lambda x: np.moveaxis(x, 1, 3)),
        (Slice(**NAMES, axis=1, start=1, step=2, count=2), lambda x: x[:, :, 1::2]),
        (
            Pad(**NAMES, before=(0, 1, 2), after=(1, 0, 3), value=9),
            lambda x: np.pad(x, ((0, 0), (0, 1), (1, 0), (2, 3)), constant_values=9),
        ),
        (Concat(layer="l", inputs=("x", "x"), output="y", axis=2), lambda x: np.concatenate([x, x], 3)),
        (
            Clamp(**NAMES, low=whole(0, -1, -2, -3, -4), high=whole(5, 6, 7, 8, 9), axis=2),
            lambda x: x.clip(whole(0, -1, -2, -3, -4), whole(5, 6, 7, 8, 9)),
        ),
        (
            Requantize(
                **NAMES,
                multiplier=whole(1, 3, -5, 7),
                addend=whole(0, 8, 16, 4),
                shift=whole(2, 2, 3, 2),
                zero=whole(1),
                rounding="half_even",
                low=-90,
                high=90,
                axis=1,
            ),
            lambda x: np.rint(
                ((x - 1) * whole(1, 3, -5, 7)[:, None] + whole(0, 8, 16, 4)[:, None])
                / 2.0 ** whole(2, 2, 3, 2)[:, None]
            ).clip(-90, 90),
        ),
        (
            Lookup(**NAMES, table=np.stack([np.arange(256), np.arange(256) ** 2, -np.arange(256)]), low=-128, axis=0),
            lambda x: np.stack([x[:, 0] + 128, (x[:, 1] + 128) ** 2, -x[:, 2] - 128], 1),
        ),
        (
            Affine(
                **NAMES,
                factor=whole(1, -1, 0, 2).reshape(1, 4, 1),
                bias=np.arange(60).reshape(3, 4, 5),
                zero=whole(3),
                shift=2,
            ),
            lambda x: 4 * (x - 3) * whole(1, -1, 0, 2)[:, None] + np.arange(60).reshape(3, 4, 5),
        ),
        (
            Linear(**NAMES, weight=np.arange(10).reshape(2, 5) - 4, bias=whole(3, -7), zero=whole(2), align=1),
            lambda x: 2 * ((x - 2) @ (np.arange(10).reshape(2, 5) - 4).T) + whole(3, -7),
        ),
    ],
    ids=lambda v: v.kind if isinstance(v, Op) else "",
)
def test_along_any_dimension(op, expected):
    assert np.array_equal(both(single(op, X.shape[1:]), X), expected(X))


def pair(op: Op, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Returns the result of an operation on two tensors, which lie side by side in the input of its program."""
    flat = np.concatenate([a.reshape(len(a), -1), b.reshape(len(b), -1)], 1)
    n, low, high = a[0].size, int(flat.min()), int(flat.max())
    spec = lambda name, shape, most=(low, high): TensorSpec(name, shape, *most, np.ones(1), ZERO)  # noqa: E731
    ops: list[Op] = []
    for name, start, part in (("a", 0, a), ("b", n, b)):
        ops.append(
            Slice(layer="l", inputs=("x",), output=f"{name}.flat", axis=0, start=start, step=1, count=part[0].size)
        )
        ops.append(Reshape(layer="l", inputs=(f"{name}.flat",), output=name, shape=part.shape[1:]))
    tensors = {"x": spec("x", flat.shape[1:])}
    for name, part in (("a", a), ("b", b)):
        tensors |= {f"{name}.flat": spec(f"{name}.flat", (part[0].size,)), name: spec(name, part.shape[1:])}
    shape = Reference(IntegerProgram()).compute(op, [a, b]).shape[1:]
    tensors["y"] = spec("y", shape, (-(2**40), 2**40))
    return both(IntegerProgram(tensors, [*ops, op], "x", "y"), flat)


def test_gates_and_matrices_are_what_loops_say():
    rng = np.random.default_rng(0)
    a, b = rng.integers(-99, 99, (2, 3, 4, 5)), rng.integers(0, 255, (2, 3, 1, 1))
    op = Multiply(layer="l", inputs=("a", "b"), output="y", zeros=whole(7, 3))
    y = pair(op, a, b)
    for i in product(*map(range, a.shape)):
        assert y[i] == (int(a[i]) - 7) * (int(b[i[0], i[1], 0, 0]) - 3)
    a, b = rng.integers(-99, 99, (2, 3, 4)), rng.integers(0, 255, (2, 4, 5))
    y = pair(MatMul(layer="l", inputs=("a", "b"), output="y", zeros=whole(7, 3)), a, b)
    for n, i, j in product(range(2), range(3), range(5)):
        assert y[n, i, j] == sum((int(a[n, i, k]) - 7) * (int(b[n, k, j]) - 3) for k in range(4))


def test_published_products_of_two_tensors():
    a, b = whole(-100, 0, 37, 127), whole(0, 128, 200, 255)
    m, h = multiplier(np.array([0.05 / 255 / 0.04]))
    assert (m.tolist(), h.tolist()) == ([1347440720], [38])
    y = requantized((a - 10) * b, m, whole(-5) << h, h, "half_even").clip(-128, 127)
    assert y.tolist() == [-5, -11, 21, 127]


def test_published_doubling_of_a_map():
    places = np.array([[0, 1], [0, 1], [0, 1], [1, 1]])
    weights = np.array([[4, 0], [3, 1], [1, 3], [4, 0]])
    op = Resample(**NAMES, rows=places, row_weights=weights, columns=places, column_weights=weights, zero=ZERO)
    y = both(single(op, (1, 2, 2)), np.array([[[[10, 20], [30, 60]]]]))
    assert y[0, 0].tolist() == [[160, 200, 280, 320], [240, 300, 420, 480], [400, 500, 700, 800], [480, 600, 840, 960]]


def test_published_roots_and_norms():
    assert root(whole(0, 15, 16, 2**31 - 1, 10**12)).tolist() == [0, 3, 4, 46340, 1000000]
    how = {"groups": 1, "finer": 8, "fraction": 14, "sign": whole(1), "bias": whole(0), "axis": 0}
    y = both(single(Normalize(**NAMES, **how, eps=0), (8,)), whole(12, -7, 33, 4, -20, 8, 0, 1)[None])
    assert y.tolist() == [[9290, -12434, 33299, 143, -27297, 4716, -4430, -3287]]
    y = both(single(Normalize(**NAMES, **how, eps=104858), (4,)), whole(5, 5, 6, 4)[None])
    assert y.tolist() == [[0, 0, 21157, -21157]]
    how |= {"sign": whole(1, -1, 0), "bias": whole(5, 6, 7)}
    y = both(single(Normalize(**NAMES, **how, eps=0), (3, 2)), np.full((1, 3, 2), 9))
    assert y.tolist() == [[[5, 5], [6, 6], [7, 7]]], "equal codes have no deviation"


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_unit_lengths(axis):
    how = {"axis": axis, "zero": whole(3), "finer": 8, "fraction": 14, "least": 900}
    x = X.copy()
    x[0, 0], x[1] = 3, np.where(np.arange(60).reshape(3, 4, 5) % 7, 3, 5)  # lengths of 0 and below the least one
    y = both(single(UnitLength(**NAMES, **how), x.shape[1:]), x)
    for place in product(*map(range, x.shape)):
        run = tuple(slice(None) if k == axis + 1 else i for k, i in enumerate(place))
        length = max(math.isqrt(sum((int(q) - 3) ** 2 for q in x[run]) * 4**8), 900)
        assert y[place] == math.floor(Fraction((int(x[place]) - 3) * 2**22, length) + Fraction(1, 2))


@pytest.mark.parametrize("axes", [(0,), (1, 2), (0, 2)])
def test_lengths(axes):
    y = both(single(Length(**NAMES, axes=axes, zero=whole(-5), finer=8), X.shape[1:]), X)
    squares = ((X + 5) ** 2).sum(tuple(axis + 1 for axis in axes), keepdims=True)
    assert y.shape == squares.shape and all(y.flat[k] == math.isqrt(int(s) << 16) for k, s in enumerate(squares.flat))


def test_quotients():
    program = single(Divide(layer="l", inputs=("x", "x"), output="y", zeros=whole(4, -3), fraction=18), X.shape[1:])
    y = both(program, X)
    for k, code in enumerate(X.flat):
        above, over = int(code) - 4, int(code) + 3
        exact = Fraction(above * 2**18 * (1 if over > 0 else -1), abs(over) or 1)
        assert y.flat[k] == (math.floor(exact + Fraction(1, 2)) if over else 0)
    assert (X == -3).any(), "a divisor of 0 is among them"


def test_published_softmax():
    table = np.floor(2**15 * np.exp(-0.05 * np.arange(256)) + 0.5).astype(np.int64)
    x = whole(10, 40, -20, 38)
    assert table[40 - x].tolist() == [7312, 32768, 1631, 29650]
    y = both(single(Softmax(**NAMES, axis=1, table=table, fraction=8), (2, 4)), np.stack([x, x[::-1]])[None])
    assert y.tolist() == [[[26, 118, 6, 106], [106, 6, 118, 26]]]
