"""Each operation against a plain Python loop, and the fast executor against the definition."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qexp.errors import QexpError
from qexp.integer import int8
from qexp.integer.fast import Fast
from qexp.integer.program import (
    Add,
    Clamp,
    Concat,
    Conv,
    Flatten,
    IntegerProgram,
    Linear,
    Lookup,
    MaxPool,
    Op,
    Requantize,
    StridedPad,
    SumPool,
    TensorSpec,
)
from qexp.integer.reference import Reference
from qexp.integer.register import Accumulator

ZERO = np.zeros(1, np.int64)
few = settings(max_examples=25, deadline=None)


def whole(*values: int) -> np.ndarray:
    return np.array(values, dtype=np.int64)


def single(op: Op, shape: tuple[int, ...], low: int = -128, high: int = 127) -> IntegerProgram:
    """Returns a program of one operation; its result's limits are wide."""
    tensors = {name: TensorSpec(name, shape, low, high, np.ones(1), ZERO) for name in op.inputs}
    out = Reference(IntegerProgram(dict(tensors), [op], op.inputs[0], "y")).compute(
        op, [np.zeros((1, *shape), np.int64) for _ in op.inputs]
    )
    tensors["y"] = TensorSpec("y", out.shape[1:], -(2**40), 2**40, np.ones(1), ZERO)
    return IntegerProgram(tensors, [op], op.inputs[0], "y")


def both(program: IntegerProgram, x: np.ndarray) -> np.ndarray:
    """Returns the definition's result, after checking that the fast executor's is the same."""
    y = Reference(program).run(x)
    assert torch.equal(Fast(program).run(x), torch.from_numpy(y))
    with torch.autocast("cpu"):  # as around the evaluation of a bf16-mixed run
        assert torch.equal(Fast(program, watched=()).run(x), torch.from_numpy(y))
    return y


def convolved(x, weight, bias, stride, padding, dilation, groups, zero, align) -> np.ndarray:
    """A convolution as seven nested loops over Python integers."""
    n, _, height, width = x.shape
    outputs, per, kh, kw = weight.shape
    (sh, sw), (ph, pw), (dh, dw) = stride, padding, dilation
    rows, columns = (
        (m + 2 * p - d * (k - 1) - 1) // s + 1 for m, p, d, k, s in ((height, ph, dh, kh, sh), (width, pw, dw, kw, sw))
    )
    y = np.zeros((n, outputs, rows, columns), np.int64)
    for i, o, r, c in product(range(n), range(outputs), range(rows), range(columns)):
        total = 0
        for k, a, b in product(range(per), range(kh), range(kw)):
            u, v = r * sh + a * dh - ph, c * sw + b * dw - pw
            if 0 <= u < height and 0 <= v < width:
                channel = o // (outputs // groups) * per + k
                z = int(zero[channel] if zero.size > 1 else zero[0])
                total += (int(x[i, channel, u, v]) - z) * int(weight[o, k, a, b])
        y[i, o, r, c] = (total << align) + int(bias[o])
    return y


@few
@given(data=st.data())
def test_convolutions_are_what_loops_say(data):
    pick = lambda low, high: data.draw(st.integers(low, high))  # noqa: E731
    rng = np.random.default_rng(pick(0, 999))
    groups, per, each = pick(1, 2), pick(1, 3), pick(1, 2)
    kernel, stride, padding = (pick(1, 3), pick(1, 3)), (pick(1, 2), pick(1, 2)), (pick(0, 2), pick(0, 2))
    dilation = (pick(1, 2), 1)
    channels = groups * per
    weight = rng.integers(-128, 128, (groups * each, per, *kernel))
    bias, zero = rng.integers(-999, 999, groups * each), rng.integers(-9, 9, data.draw(st.sampled_from([1, channels])))
    x = rng.integers(-128, 128, (2, channels, 6, 5))
    op = Conv(
        layer="c", inputs=("x",), output="y", weight=weight, bias=bias, zero=zero, stride=stride, padding=padding,
        dilation=dilation, groups=groups, align=pick(0, 4),
    )  # fmt: skip
    expected = convolved(x, weight, bias, stride, padding, dilation, groups, zero, op.align)
    assert np.array_equal(both(single(op, x.shape[1:]), x), expected)


@few
@given(st.integers(0, 999), st.sampled_from(["half_even", "half_up", "half_away", "floor", "trunc"]), st.booleans())
def test_requantization_is_what_python_integers_say(seed, rounding, per_channel):
    rng = np.random.default_rng(seed)
    x, n = rng.integers(-(2**20), 2**20, (2, 3, 2, 2)), 3 if per_channel else 1
    factor, shift, zero = rng.integers(1, 2**20, n), rng.integers(0, 24, n), rng.integers(-5, 5, n)
    addend = rng.integers(-9, 9, n) << shift
    op = Requantize(
        layer="r", inputs=("x",), output="y", multiplier=factor, addend=addend, shift=shift, zero=zero, rounding=rounding,
        low=-100, high=90,
    )  # fmt: skip
    y = both(single(op, (3, 2, 2), -(2**20), 2**20), x)
    for i, c, r, s in np.ndindex(x.shape):
        k = c if per_channel else 0
        total = (int(x[i, c, r, s]) - int(zero[k])) * int(factor[k]) + int(addend[k])
        half, size = 2 ** int(shift[k]) // 2, 2 ** int(shift[k])
        low, rest = total // size, total % size
        up = {
            "floor": False,
            "trunc": total < 0 and rest > 0,
            "half_up": size > 1 and rest >= half,
            "half_even": size > 1 and (rest > half or (rest == half and low % 2 == 1)),
            "half_away": size > 1 and (rest > half or (rest == half and total > 0)),
        }[rounding]
        assert y[i, c, r, s] == min(max(low + up, -100), 90)


X = np.arange(-18, 18).reshape(1, 2, 6, 3)[:, :, :, :] * 3 % 41 - 20


@pytest.mark.parametrize(
    ("op", "expected"),
    [
        (Clamp(layer="l", inputs=("x",), output="y", low=whole(0), high=whole(5)), lambda x: np.clip(x, 0, 5)),
        (
            Clamp(layer="l", inputs=("x",), output="y", low=whole(0, -1), high=whole(5, 7)),
            lambda x: np.stack([np.clip(x[:, 0], 0, 5), np.clip(x[:, 1], -1, 7)], 1),
        ),
        (
            SumPool(layer="l", inputs=("x",), output="y", window=(2, 3), stride=(2, 1), padding=(0, 0), zero=whole(4)),
            lambda x: (x - 4).reshape(1, 2, 3, 2, 3).sum((3, 4))[..., None],
        ),
        (
            MaxPool(
                layer="l", inputs=("x",), output="y", window=(2, 3), stride=(2, 3), padding=(0, 0), dilation=(1, 1), size=(3, 1)
            ),
            lambda x: x.reshape(1, 2, 3, 2, 3).max((3, 4))[..., None],
        ),
        (Flatten(layer="l", inputs=("x",), output="y"), lambda x: x.reshape(1, -1)),
        (Lookup(layer="l", inputs=("x",), output="y", table=np.arange(256)[::-1] ** 2, low=-128), lambda x: (127 - x) ** 2),
        (
            StridedPad(layer="l", inputs=("x",), output="y", stride=2, before=1, after=2, zero=whole(7)),
            lambda x: np.pad(x[:, :, ::2, ::2], ((0, 0), (1, 2), (0, 0), (0, 0)), constant_values=7),
        ),
        (
            Add(layer="l", inputs=("x", "x"), output="y", zeros=whole(3, -2), shifts=whole(0, 5)),
            lambda x: (x - 3) + 32 * (x + 2),
        ),
        (Concat(layer="l", inputs=("x", "x"), output="y"), lambda x: np.concatenate([x, x], 1)),
    ],
    ids=lambda v: v.kind if isinstance(v, Op) else "",
)  # fmt: skip
def test_the_other_operations(op, expected):
    assert np.array_equal(both(single(op, X.shape[1:]), X), expected(X))


def test_pools_beyond_the_border():
    x = np.array([[[[-5, 3, 2], [7, -9, 4], [1, 8, -6]]]])
    pool = {"layer": "p", "inputs": ("x",), "output": "y", "window": (3, 3), "stride": (2, 2), "padding": (1, 1)}
    y = both(single(MaxPool(**pool, dilation=(1, 1), size=(2, 2)), (1, 3, 3)), x)
    assert y.tolist() == [[[[7, 4], [8, 8]]]]
    y = both(single(SumPool(**pool, zero=whole(1)), (1, 3, 3)), x)
    assert y.tolist() == [[[[-4 - 4, 0 - 4], [7 - 4, -3 - 4]]]]
    ceil = MaxPool(**pool | {"window": (2, 2), "padding": (0, 0)}, dilation=(1, 1), size=(2, 2))
    assert both(single(ceil, (1, 3, 3)), x).tolist() == [[[[7, 4], [8, -6]]]]


def test_a_linear_layer_and_its_registers():
    weight, x = np.array([[100, 100, -120], [1, 1, 1]]), np.array([[120, 120, 120]])
    op = Linear(layer="fc", inputs=("x",), output="y", weight=weight, bias=whole(5, 5), zero=ZERO)
    program = single(op, (3,))
    assert both(program, x).tolist() == [[9605, 365]]
    held = {}
    for overflow, point in product(("saturate", "wrap"), ("end", "each")):
        register = Accumulator(15, overflow, point)
        held[overflow, point] = Reference(program, register).run(x).tolist()[0], register.overflows["fc"]
    # 12000 + 12000 leaves 15 bits (16383) on the way, 9600 does not
    assert held["saturate", "end"] == held["wrap", "end"] == ([9605, 365], 0)
    assert held["saturate", "each"] == ([16383 - 14400 + 5, 365], 1)
    assert held["wrap", "each"] == ([9605, 365], 2), "wrapped sums come back"
    narrow = Accumulator(9, "saturate")
    assert Reference(program, narrow).run(x).tolist() == [[260, 260]] and narrow.widest["fc"] == 15
    fast = Accumulator(9, "saturate")
    assert Fast(program, fast).run(x).tolist() == [[260, 260]] and fast.overflows == narrow.overflows


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from(["half_even", "half_up", "half_away", "floor", "trunc"]),
    st.sampled_from([(0, 255), (-128, 127), (-7, 7), (0, 2**20)]),
    st.booleans(),
    st.booleans(),
    st.integers(0, 2**32 - 1),
)
def test_a_layer_and_what_follows_it_in_one_pass(rounding, codes, clamped, narrow, seed):
    """Bias, clamp and requantization with ties: a multiplier of one and small shifts."""
    rng, (low, high) = np.random.default_rng(seed), codes
    weight, bias = rng.integers(-127, 128, (6, 2, 3, 3)), rng.integers(-5000, 5000, 6)
    conv = Conv(
        layer="c", inputs=("x",), output="a", weight=weight, bias=bias, zero=whole(rng.integers(low, high + 1)),
        padding=(1, 1), groups=2, align=int(rng.integers(0, 4)),
    )  # fmt: skip
    clamp = Clamp(layer="r", inputs=("a",), output="b", low=whole(0), high=whole(2**40))
    multiplier, shift = rng.integers(1, 2**20, 6), rng.integers(8, 30, 6)
    multiplier[::2], shift[::2] = 1, 3
    limits = (0, 255) if narrow else (-(2**20), 2**20)
    last = Requantize(
        layer="q", inputs=("b" if clamped else "a",), output="y", multiplier=multiplier, addend=whole(7) << shift, shift=shift,
        zero=whole(0 if clamped else -3), rounding=rounding, low=limits[0], high=limits[1],
    )  # fmt: skip
    ops = [conv, clamp, last] if clamped else [conv, last]
    specs = {"x": ((4, 5, 5), low, high), "a": ((6, 5, 5), -(2**38), 2**38), "b": ((6, 5, 5), 0, 2**38)}
    specs["y"] = ((6, 5, 5), *limits)
    tensors = {n: TensorSpec(n, s, a, b, np.ones(1), ZERO) for n, (s, a, b) in specs.items()}
    x = rng.integers(low, high + 1, (2, 4, 5, 5))
    heard: list[str] = []
    fast = Fast(IntegerProgram(tensors, ops, "x", "y"), watched=())
    fast.run(x, lambda name, _: heard.append(name))
    assert heard == ["x", "y"], "one pass"
    both(IntegerProgram(tensors, ops, "x", "y"), x)


def test_8_bit_products_are_used_where_they_are_exact():
    """Nine greatest products fit, and more in parts; a weight of 8 bits and a sign does not, nor do parts beyond 24 bits."""
    op = Conv(
        layer="c", inputs=("x",), output="y", weight=np.full((2, 3, 3, 3), -127), bias=whole(0, 0), zero=whole(200)
    )
    assert int8.suits(op, 0, 255) == int8.suits(op, -128, 127) == int8.available()
    assert not int8.suits(op, 0, 256) and not int8.suits(op, -129, 127)
    assert not int8.suits(replace(op, weight=op.weight - 1), 0, 255)
    assert int8.suits(replace(op, weight=np.full((2, 999, 3, 3), 127)), 0, 255) == int8.available()
    assert not int8.suits(replace(op, weight=np.full((2, 16, 9, 9), 127)), 0, 255)
    assert not int8.suits(replace(op, zero=whole(1, 2, 3)), 0, 255)
    for low, high in ((0, 255), (-128, 127)):
        for x in (np.full((2, 3, 4, 5), low), np.full((2, 3, 4, 5), high)):
            both(single(replace(op, padding=(1, 1), stride=(2, 1)), (3, 4, 5), low, high), x)


@pytest.mark.parametrize("bad", [{"bits": 1}, {"overflow": "clip"}, {"point": "never"}])
def test_registers_that_do_not_exist(bad):
    with pytest.raises(QexpError, match=r"use 2\.\.64 bits, saturate \| wrap, end \| each"):
        Accumulator(**bad)


def test_only_integers_enter():
    program = single(Flatten(layer="f", inputs=("x",), output="y"), (2, 2, 2))
    with pytest.raises(QexpError, match=r"integers .int64. are needed, got float64"):
        Reference(program).run(np.zeros((1, 2, 2, 2)))
    with pytest.raises(QexpError, match=r"got codes \[1, 3, 2, 2\]; needed are \[N, 2, 2, 2\] in -128..127"):
        Reference(program).run(np.zeros((1, 3, 2, 2), np.int64))
    with pytest.raises(QexpError, match="needed are"):
        Reference(program).run(np.full((1, 2, 2, 2), 128))
