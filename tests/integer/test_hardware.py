"""Units with an arithmetic of their own: published vectors, the plain convolution where nothing is lost, counts where it is."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import numpy as np
import pytest
import torch
from qexp_kernels import winograd_conv2d

from qexp.errors import QexpError
from qexp.integer.fast import Fast
from qexp.integer.hardware import with_unit
from qexp.integer.lowering import lower
from qexp.integer.program import Conv, IntegerProgram, Linear, Requantize, TensorSpec
from qexp.integer.reference import Reference
from qexp.integer.register import Accumulator
from tests.integer.conftest import FIXED
from tests.networks import Residual

ZERO = np.zeros(1, np.int64)


def conv(weight: np.ndarray, shape: tuple[int, ...], padding=(1, 1)) -> IntegerProgram:
    """Returns the program of one 3x3 convolution of int8 codes."""
    bias = np.arange(len(weight))
    op = Conv(layer="c", inputs=("x",), output="y", weight=weight, bias=bias, zero=ZERO, padding=padding)
    out = (len(weight), shape[1] + 2 * padding[0] - 2, shape[2] + 2 * padding[1] - 2)
    one = np.ones(1)
    tensors = {"x": TensorSpec("x", shape, -128, 127, one, ZERO), "y": TensorSpec("y", out, -(2**31), 2**31, one, ZERO)}
    return IntegerProgram(tensors, [op], "x", "y")


@pytest.mark.parametrize(("outputs", "two_d"), list(product((2, 4, 5), (False, True))))
def test_winograd_without_saturation_is_the_plain_convolution(outputs, two_d):
    rng = np.random.default_rng(outputs)
    program = conv(rng.integers(-127, 128, (3, 2, 3, 3)), (2, 7, 9))
    x = rng.integers(-128, 128, (2, 2, 7, 9))
    unit = with_unit(program, "winograd", outputs=outputs, two_d=two_d, clamp_int16=False)
    assert np.array_equal(Reference(unit).run(x), Reference(program).run(x))


@pytest.mark.parametrize("outputs", [4, 5])
def test_winograd_in_two_dimensions_saturates_as_the_kernel_does(outputs):
    rng = np.random.default_rng(outputs)
    program = conv(rng.integers(-127, 128, (3, 2, 3, 3)), (2, 8, 8), (0, 0))
    x = rng.integers(-128, 128, (2, 2, 8, 8))
    register = Accumulator()
    y = Reference(with_unit(program, "winograd", outputs=outputs, two_d=True), register).run(x)
    expected, lost = winograd_conv2d(
        torch.from_numpy(x), torch.from_numpy(program.ops[0].weight), outputs=outputs, two_d=True, clamp_int16=True
    )
    assert np.array_equal(y - np.arange(3)[:, None, None], expected.numpy())
    assert register.overflows["c"] == int(lost.sum()) > 0
    assert not np.array_equal(y, Reference(program).run(x))


@pytest.mark.parametrize("outputs", [2, 4, 5])
def test_winograd_in_one_dimension_loses_nothing_of_int8(outputs):
    program = conv(np.full((1, 1, 3, 3), -127), (1, 6, 6))
    x, register = np.full((1, 1, 6, 6), -128), Accumulator()
    assert np.array_equal(
        Reference(with_unit(program, "winograd", outputs=outputs), register).run(x), Reference(program).run(x)
    )
    assert register.overflows["c"] == 0


def shifter(weight: list[int], drop: int, negative: str, align: int = 0) -> IntegerProgram:
    n = len(weight)
    op = Linear(
        layer="s", inputs=("x",), output="y", weight=np.array([weight]), bias=ZERO, zero=ZERO, align=align,
        unit={"name": "shift", "negative": negative, "drop": [drop]},
    )  # fmt: skip
    one = np.ones(1)
    tensors = {"x": TensorSpec("x", (n,), -128, 127, one, ZERO), "y": TensorSpec("y", (1,), -(2**60), 2**60, one, ZERO)}
    return IntegerProgram(tensors, [op], "x", "y")


def test_the_shift_unit_gives_the_published_sum():
    """Codes (70, -58, 86), exponents (-2, -4, -1), shifts (11, 8, 13): the accumulator holds -576000."""
    program = shifter([2**11, 2**8, -(2**13)], 0, "right_shift")
    assert Reference(program).run(np.array([[70, -58, 86]])).tolist() == [[-576000]]


@pytest.mark.parametrize(
    ("negative", "expected"),
    [("exact", 82 + 64 * 2**13), ("right_shift", 8 << 16), ("zero", 0), ("legacy", (82 + 64) << 16)],
)
def test_negative_shifts(negative, expected):
    """Codes (82, 64) with shifts (-16, -3): in the program's units, 2^-16 of the register's, the weights are 1 and 2^13."""
    program = shifter([1, 2**13], 16, negative)
    x = np.array([[82, 64]])
    assert Reference(program).run(x).tolist() == [[expected]] and Fast(program).run(x).tolist() == [[expected]]


def test_right_shifts_drop_bits_before_the_sign_is_applied():
    program = shifter([-1], 2, "right_shift")
    assert Reference(program).run(np.array([[7]])).tolist() == [[-(7 >> 2) << 2]]


def test_products_rounded_to_a_word(quantize):
    """Nine taps of 0.3 * 0.02 vanish one by one; three large products saturate before the bias comes."""

    def unit(weight, x, bias, align, accumulate="per_op", n=8):
        op = Linear(
            layer="f", inputs=("x",), output="y", weight=np.array([weight]), bias=np.array([bias]), zero=ZERO, align=align,
            unit={"name": "fixed_point", "accumulate": accumulate, "bits": n, "shift": 6, "rounding": "half_even", "bias": True},
        )  # fmt: skip
        one = np.ones(1)
        tensors = {
            "x": TensorSpec("x", (len(x),), -128, 127, one, ZERO),
            "y": TensorSpec("y", (1,), -128, 127, one, ZERO),
        }
        register = Accumulator()
        return int(
            Reference(IntegerProgram(tensors, [op], "x", "y"), register).run(np.array([x]))[0, 0]
        ), register.overflows["f"]

    assert unit([19] * 9, [1] * 9, 0, 0) == (0, 0)  # steps of 1/64, sf 1
    assert unit([58] * 3, [64] * 3, -58, 0) == (127 - 58, 1)  # three codes of 58 saturate at 127; then -0.9
    assert unit([58, 58, 58, -58], [64] * 4, 0, 0) == (116, 0)
    assert unit([58, 58, 58, -58], [64] * 4, 0, 0, "per_add") == (127 - 58, 1)
    assert unit([58], [64], 1, 1) == (58, 0), "58.5 ties to the even word"


def test_a_program_moves_to_another_unit_and_back(quantize):
    torch.manual_seed(0)
    inq = {"_target_": "qexp.quantizers.power_of_two.INQ"}
    fixed = {"input": None, "output": FIXED, "bias": FIXED | {"bits": 8}, "weight": inq}
    rules = {
        "stem": {"layers": "stem", "input": FIXED},
        "sums": {"types": ["Add", "AdaptiveAvgPool2d"], "output": FIXED},
    }
    model, images = quantize(Residual(), 4, rules=rules, **fixed)
    program = lower(model, images[:1]).program
    codes = program.encode(images.numpy())
    expected = Reference(program).run(codes)
    shift = with_unit(program, "shift", negative="exact")
    assert sum(bool(getattr(op, "unit", {})) for op in shift.ops) == 5
    assert np.array_equal(Reference(shift).run(codes), expected)
    assert np.array_equal(Reference(with_unit(program, "shift", inflation=15)).run(codes), expected), (
        "15 bits hold them all"
    )
    assert not np.array_equal(Reference(with_unit(program, "shift", inflation=0)).run(codes), expected)
    winograd = with_unit(program, "winograd")
    assert [op.layer for op in winograd.ops if getattr(op, "unit", {})] == ["stem"], (
        "the one 3x3 of stride 1 and one group"
    )
    assert np.array_equal(Reference(winograd).run(codes), expected)
    with pytest.raises(QexpError, match="unit='systolic' is not allowed; use winograd or shift"):
        with_unit(program, "systolic")
    with pytest.raises(QexpError, match="use outputs"):
        with_unit(program, "winograd", outputs=3)
    empty = replace(program, ops=[op for op in program.ops if isinstance(op, Requantize)])
    with pytest.raises(QexpError, match="no layer of this program can run on the winograd unit"):
        with_unit(empty, "winograd")
