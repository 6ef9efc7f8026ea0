"""What lies between two convolutions is one pass over bytes, and every code stays that of the definition."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from qexp.integer import int8
from qexp.integer.fast import Fast
from qexp.integer.lines import bytes_at, straight
from qexp.integer.lowering import lower
from qexp.integer.program import Add as Sum
from qexp.integer.program import (
    Clamp,
    Conv,
    IntegerProgram,
    Linear,
    MaxPool,
    Requantize,
    StridedPad,
    TensorSpec,
)
from qexp.integer.reference import Reference
from qexp.integer.reorder import narrow_first
from qexp.models.modules import Add, Concat
from tests.integer.conftest import INT8

ZERO = np.zeros(1, np.int64)


def whole(*values: int) -> np.ndarray:
    return np.array(values, dtype=np.int64)


def equal_in_all(program: IntegerProgram, x: np.ndarray) -> Fast:
    """Returns the executor that watches nothing, after comparing every code with and without watching."""
    wanted: dict[str, np.ndarray] = {}
    Reference(program).run(x, lambda name, codes: wanted.update({name: codes}))
    fast = Fast(program, watched=())
    assert torch.equal(fast.run(x), torch.from_numpy(wanted[program.output]))
    names = list(program.tensors)
    for watched in (None, names[1::2], names[::3]):
        seen: dict[str, torch.Tensor] = {}
        Fast(program, watched=watched).run(x, lambda name, codes, seen=seen: seen.update({name: codes}))
        for name in names if watched is None else watched:
            assert torch.equal(seen[name].long(), torch.from_numpy(wanted[name])), name
    return fast


def test_layers_that_read_a_tensor_on_the_same_grid_share_its_bytes():
    """Three requantizations of one sum, two of them the same: two results, and each name has its codes."""
    names = ("a", "b", "c")
    bounds = {"x": (0, 15), "y": (-(2**12), 2**12), **dict.fromkeys(names, (0, 255)), "z": (0, 765)}
    tensors = {n: TensorSpec(n, (2, 3, 3), low, high, np.ones(1), ZERO) for n, (low, high) in bounds.items()}
    weight = np.arange(-18, 18).reshape(2, 2, 3, 3)
    conv = Conv(inputs=("x",), output="y", layer="y", weight=weight, bias=whole(5, 9), zero=whole(3), padding=(1, 1))
    grid = {"multiplier": whole(3), "addend": whole(40), "zero": ZERO, "rounding": "half_even", "low": 0, "high": 255}
    steps = [Requantize(inputs=("y",), output=n, layer=n, shift=whole(4 + (n == "c")), **grid) for n in names]
    add = Sum(inputs=names[1:], output="z", layer="z", zeros=whole(0, 0), shifts=whole(0, 0))
    program = IntegerProgram(tensors, [conv, *steps, add], "x", "z")
    x = np.random.default_rng(0).integers(0, 16, (3, 2, 3, 3))
    fast = Fast(program, watched=names)
    made = fast.steps[0][2](torch.from_numpy(x).to(torch.uint8))
    assert made[0] is made[1] and not torch.equal(made[0], made[2])
    equal_in_all(program, x)


class Residual(nn.Module):
    """Two sums: one with its input, one with a convolution of another depth; a pool and a concatenation between."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Conv2d(*pair, 3, padding=1) for pair in ((3, 8), (8, 8), (8, 8)))
        self.short, self.d = nn.Conv2d(8, 8, 1), nn.Conv2d(16, 8, 3, padding=1, groups=2)
        self.fc, self.pool, self.relu = nn.Linear(8, 5), nn.MaxPool2d(3, 2, 1), nn.ReLU()
        self.relu2, self.relu3 = nn.ReLU(), nn.ReLU()
        self.add, self.add2, self.cat, self.mean = Add(), Add(), Concat(), nn.AdaptiveAvgPool2d(1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.pool(self.relu(self.a(x)))
        x = self.relu2(self.add(x, self.b(x)))
        y = self.add2(self.c(x), self.short(x))
        y = self.relu3(self.d(self.cat(x, y)))
        return self.fc(self.mean(y).flatten(1))


@pytest.mark.parametrize(("wbit", "abit"), [(8, 8), (4, 4), (3, 7)])
def test_a_network_with_sums(quantize, wbit, abit):
    torch.manual_seed(2)
    model, images = quantize(Residual(), wbit, abit, rules=INT8)
    program = lower(model, images[:1]).program
    fast = equal_in_all(program, program.encode(images[:3].numpy()))
    kept = [name for _, outputs, _ in fast.steps for name in outputs]
    wide = [n for n in kept if fast.stored(n).dtype is not torch.uint8]
    assert len(fast.steps) <= 13 and len(wide) <= 3, kept  # the average, the features, the scores


def residual(seed: int, rounding: str, low: int) -> tuple[IntegerProgram, np.ndarray]:
    """Returns a sum of a convolution's codes and of other codes, and two grids of it, one of them with ties."""
    rng = np.random.default_rng(seed)
    high = low + 255
    conv = Conv(
        layer="c", inputs=("x",), output="a", weight=rng.integers(-127, 128, (4, 4, 3, 3)), bias=rng.integers(-999, 999, 4),
        zero=whole(rng.integers(low, high)), padding=(1, 1),
    )  # fmt: skip

    def grid(source: str, output: str, factor: int, shift: int) -> Requantize:
        return Requantize(
            layer=output, inputs=(source,), output=output, multiplier=whole(factor), addend=whole(5 << shift), shift=whole(shift),
            zero=whole(3), rounding=rounding, low=low, high=high,
        )  # fmt: skip

    ops = [
        grid("x", "other", 3, 2),
        grid("a", "codes", int(rng.integers(1, 2**20)), 28),
        replace(grid("codes", "wide", 77, 0), low=-(2**30), high=2**30),
        Sum(layer="s", inputs=("wide", "other"), output="sum", zeros=whole(1, -2), shifts=whole(0, 6)),
        Clamp(layer="r", inputs=("sum",), output="cut", low=whole(-900), high=whole(2**30)),
        grid("cut", "one", 1, 7),
        grid("cut", "two", int(rng.integers(1, 2**20)), 27),
        Sum(layer="t", inputs=("one", "two"), output="y", zeros=whole(0, 0), shifts=whole(1, 0)),
    ]
    spec = {"x": (low, high), "a": (-(2**30), 2**30), "wide": (-(2**30), 2**30), "sum": (-(2**31), 2**31)}
    spec |= {"cut": (-900, 2**31), "y": (-(2**20), 2**20)} | dict.fromkeys(
        ("other", "codes", "one", "two"), (low, high)
    )
    names = ["x", "a", *(op.output for op in ops)]
    tensors = {n: TensorSpec(n, (4, 5, 5), *spec[n], np.ones(1), ZERO) for n in names}
    return IntegerProgram(tensors, [conv, *ops], "x", "y"), rng.integers(low, high + 1, (2, 4, 5, 5))


@pytest.mark.parametrize("rounding", ["half_even", "half_up", "half_away", "floor", "trunc"])
@pytest.mark.parametrize("low", [0, -128, -100])
def test_a_sum_of_codes_by_every_rounding(rounding, low):
    for seed in range(6):
        equal_in_all(*residual(seed, rounding, low))


def test_a_line_is_used_only_where_it_is_right():
    codes = bytes_at(0, 3, 0, 200)
    line = replace(codes, table=np.clip((codes.table * 5 + 3) // 8, 10, 90), slopes=(5 / 8,), height=(3 - 15) / 8)
    slopes, summand, low, high = straight(line)
    at = np.arange(3, 204)
    assert (low, high) == (10, 90) and np.array_equal(
        np.clip(np.rint(at * slopes[0] + summand), 10, 90), line.table[at]
    )
    bent = line.table.copy()
    bent[60] += 1
    assert straight(replace(line, table=bent)) is None
    bent = line.table.copy()
    bent[250] += 1
    assert straight(replace(line, table=bent)) is not None, "bytes that do not come are not compared"


@pytest.mark.skipif(not int8.available(), reason="no 8-bit dot products")
@pytest.mark.parametrize("low", [0, -128])
def test_sums_beyond_24_bits_are_added_in_parts(low):
    """Greatest products of 400 channels: the sums of three or more parts, each below 2^24, in a convolution and a linear layer."""
    rng = np.random.default_rng(0)
    weight = rng.choice([-127, 127], (3, 400, 1, 3))
    weight[0], weight[1] = 127, -127
    x = rng.choice([low, low + 255], (2, 400, 2, 4))
    x[0] = low + 255
    common = {"layer": "c", "inputs": ("x",), "output": "y", "bias": whole(1, 2, 3), "zero": whole(low + 7)}
    conv = Conv(**common, weight=weight, padding=(0, 1))
    linear = Linear(**common, weight=np.repeat(weight[:, :, 0, 0], 5, axis=1))
    for op, codes in ((conv, x), (linear, np.repeat(x[:, :, 0, 0], 5, axis=1))):
        tensors = {"x": TensorSpec("x", codes.shape[1:], low, low + 255, np.ones(1), ZERO)}
        out = Reference(IntegerProgram(tensors, [op], "x", "y")).compute(op, [codes])
        tensors["y"] = TensorSpec("y", out.shape[1:], -(2**40), 2**40, np.ones(1), ZERO)
        assert abs(out).max() > 2**24 and int8.suits(op, low, low + 255)
        equal_in_all(IntegerProgram(tensors, [op], "x", "y"), codes)


def test_pools_and_paddings_choose_bytes():
    rng = np.random.default_rng(3)
    wide = {"low": -(2**20), "high": 2**20}
    grid = {"rounding": "half_up", "low": -128, "high": 127, "zero": whole(9), "layer": "q"}
    pool = {"window": (3, 2), "stride": (2, 1), "padding": (1, 0), "dilation": (1, 2), "size": (3, 3)}
    ops = [
        MaxPool(layer="p", inputs=("x",), output="p", **pool),
        Requantize(inputs=("p",), output="a", multiplier=whole(3, 1, 2), addend=whole(5), shift=whole(13), **grid),
        StridedPad(layer="s", inputs=("x",), output="s", stride=2, before=1, after=2, zero=whole(40_000)),
        Requantize(inputs=("s",), output="b", multiplier=whole(3), addend=whole(-7), shift=whole(14), **grid),
        MaxPool(layer="o", inputs=("a",), output="o", **pool | {"window": (2, 2), "size": (2, 1), "padding": (1, 1)}),
        Clamp(layer="c", inputs=("b",), output="y", low=whole(-9), high=whole(99)),
    ]
    shapes = {
        "x": (3, 5, 5),
        "p": (3, 3, 3),
        "a": (3, 3, 3),
        "s": (6, 3, 3),
        "b": (6, 3, 3),
        "o": (3, 2, 1),
        "y": (6, 3, 3),
    }
    limits = {"x": wide, "p": wide, "s": wide}
    tensors = {
        n: TensorSpec(n, s, *limits.get(n, {"low": -128, "high": 127}).values(), np.ones(1), ZERO)
        for n, s in shapes.items()
    }
    x = rng.integers(-(2**20), 2**20, (2, 3, 5, 5))
    for output, keep in (("o", (0, 1, 4)), ("y", (2, 3, 5))):
        program = IntegerProgram(
            {n: tensors[n] for n in ["x", *(ops[i].output for i in keep)]}, [ops[i] for i in keep], "x", output
        )
        assert [type(op) for op in narrow_first(program, ()).ops][:2] == [Requantize, type(ops[keep[0]])]
        equal_in_all(program, x)


SCRIPT = """
import torch
from qexp.integer import int8
assert int8.available(127) and not int8.available(), (int8.available(127), int8.available())
from tests.integer.test_fused import narrow_and_wide
print(*narrow_and_wide())
"""


def narrow_and_wide() -> tuple[bool, bool]:
    """Returns whether a layer of 7 bits and one of 8 bits run on dot products here, after comparing both with the definition."""
    rng, found = np.random.default_rng(0), []
    for high in (127, 255):
        weight = rng.choice([-127, 127], (16, 64, 3, 3))
        op = Conv(
            layer="c", inputs=("x",), output="y", weight=weight, bias=whole(*[0] * 16), zero=whole(3), padding=(1, 1)
        )
        tensors = {"x": TensorSpec("x", (64, 4, 4), 0, high, np.ones(1), ZERO)}
        tensors["y"] = TensorSpec("y", (16, 4, 4), -(2**40), 2**40, np.ones(1), ZERO)
        equal_in_all(IntegerProgram(tensors, [op], "x", "y"), rng.choice([0, high], (1, 64, 4, 4)))
        found.append(int8.suits(op, 0, high))
    return found[0], found[1]


@pytest.mark.slow
@pytest.mark.skipif(not int8.available(), reason="no 8-bit dot products to do without")
@pytest.mark.parametrize("level", ["AVX2", "AVX512_CORE"])
def test_processors_without_dot_products_take_codes_of_7_bits(level):
    """There, oneDNN adds pairs of products in 16 bits, which saturates for codes above 127."""
    environment = os.environ | {"ONEDNN_MAX_CPU_ISA": level}
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", SCRIPT], cwd=root, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.split() == ["True", "False"], done.stderr[-2000:]
