"""A program as C99: constant arrays, a memory plan, and one call per operation."""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from qexp.errors import QexpError
from qexp.integer.package.packing import coded
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
)
from qexp.numerics.packing import pack

Ints = NDArray[np.int64]


def network(program: IntegerProgram) -> tuple[str, str]:
    """Returns `network.h` and `network.c`: `void network(const int64_t *input, int64_t *output)`, for one image's codes.

    Raises:
        QexpError: A layer computes in a special unit (Winograd, shifts, a rounding after each product), which the C code lacks.
    """
    for op in program.ops:
        if isinstance(op, Conv | Linear) and op.unit:
            raise QexpError(
                f"export=package: {op.layer} computes in a {op.unit['name']!r} unit, which the C executor does not have; lower a network "
                "whose layers compute in the ordinary way"
            )
    places, total = plan_memory(program)
    scratch = max([op.weight.size for op in program.ops if isinstance(op, Conv | Linear)], default=1)
    constants, calls = [], []
    for i, op in enumerate(program.ops):
        arrays, call = _call(i, op, program, places)
        constants += arrays
        calls.append(f"    /* {_comment(op.layer)} */\n    {call}")
    start, end = program.tensors[program.input], program.tensors[program.output]
    head = f"""/* {_comment(str(program.about))} */
#ifndef NETWORK_H
#define NETWORK_H
#include "qexp_int.h"

#define NETWORK_INPUT {math.prod(start.shape)}   /* codes {start.low}..{start.high}, {" x ".join(map(str, start.shape))} */
#define NETWORK_OUTPUT {math.prod(end.shape)}

void network(const q64 *input, q64 *output);
#endif
"""
    body = "\n".join(
        [
            '#include "network.h"',
            "#include <string.h>",
            "",
            f"static q64 memory[{total}];",
            f"static int32_t weights[{scratch}];",
            *constants,
            "",
            "void network(const q64 *input, q64 *output) {",
            f"    memcpy(memory + {places[program.input]}, input, NETWORK_INPUT * sizeof(q64));",
            *calls,
            f"    memcpy(output, memory + {places[program.output]}, NETWORK_OUTPUT * sizeof(q64));",
            "}",
            "",
        ]
    )
    return head, body


def plan_memory(program: IntegerProgram) -> tuple[dict[str, int], int]:
    """Returns each tensor's offset in one array, and the array's length; memory is reused after a tensor's last read."""
    last = {**program.last_use(), program.output: len(program.ops)}
    held: list[tuple[int, int, str]] = []
    places, total = {}, 0
    for i, name in enumerate([program.input, *(op.output for op in program.ops)]):
        held = [(start, end, other) for start, end, other in held if last.get(other, 0) >= i - 1]
        size, at = math.prod(program.tensors[name].shape), 0
        for start, end, _ in sorted(held):
            if start - at >= size:
                break
            at = max(at, end)
        held.append((at, at + size, name))
        places[name], total = at, max(total, at + size)
    return places, total


def golden(inputs: Ints, outputs: Ints) -> str:
    """Returns `golden.h`: codes of images and of their scores, `[n][...]`."""
    n = len(inputs)
    return (
        f'#include "network.h"\n#define GOLDEN {n}\n'
        f"static const int32_t golden_input[GOLDEN][NETWORK_INPUT] = {{{_rows(inputs.reshape(n, -1))}}};\n"
        f"static const q64 golden_output[GOLDEN][NETWORK_OUTPUT] = {{{_rows(outputs.reshape(n, -1))}}};\n"
    )


MAIN = """#include <stdio.h>
#include "golden.h"

/* Runs the golden images and compares every score; returns 0 if all are equal. */
int main(void) {
    static q64 input[NETWORK_INPUT], output[NETWORK_OUTPUT];
    long differ = 0;
    for (int n = 0; n < GOLDEN; n++) {
        for (int i = 0; i < NETWORK_INPUT; i++) input[i] = golden_input[n][i];
        network(input, output);
        for (int i = 0; i < NETWORK_OUTPUT; i++) differ += output[i] != golden_output[n][i];
    }
    printf("%d images, %ld of %ld scores differ\\n", GOLDEN, differ, (long)GOLDEN * NETWORK_OUTPUT);
    return differ != 0;
}
"""


def _call(i: int, op: Op, program: IntegerProgram, places: dict[str, int]) -> tuple[list[str], str]:
    """Returns an operation's constant arrays and its call."""
    xs = [f"memory + {places[name]}" for name in op.inputs]
    y = f"memory + {places[op.output]}"
    arrays: list[str] = []

    def constant(field: str, values: Ints) -> str:
        arrays.append(f"static const q64 {field}{i}[] = {{{_numbers(np.ravel(values))}}};")
        return f"{field}{i}, {np.size(values)}"

    into, out = program.tensors[op.inputs[0]].shape, program.tensors[op.output].shape
    if isinstance(op, Conv | Linear):
        form = coded(op.weight)
        packed = np.frombuffer(pack(form.codes, form.bits), np.uint8)
        arrays.append(f"static const uint8_t weight{i}[] = {{{_numbers(packed)}}};")
        bias = constant("bias", op.bias).split(",")[0]
        zero = constant("zero", op.zero)
        conv = isinstance(op, Conv)
        window = (
            (*op.weight.shape[2:], *op.stride, *op.padding, *op.dilation, op.groups)
            if conv
            else (1, 1, 1, 1, 0, 0, 1, 1, 1)
        )
        unpack = f"qx_unpack(weight{i}, {op.weight.size}, {form.bits}, {int(form.signed)}, weights);\n    "
        if form.levels is not None:
            rows, count = form.levels.shape
            arrays.append(f"static const int32_t levels{i}[] = {{{_numbers(form.levels.ravel())}}};")
            unpack += f"qx_levels(weights, {rows}, {op.weight.size // rows}, levels{i}, {count});\n    "
        return arrays, (
            f"{unpack}qx_conv({xs[0]}, {_shape(into)}, weights, {bias}, {zero}, (qx_window){{{_numbers(window)}}}, {op.align}, "
            f"{_shape(out)}, {y});"
        )
    channels, inner = out[0], math.prod(out[1:])
    if isinstance(op, Requantize):
        parts = ", ".join(constant(name, getattr(op, name)) for name in ("multiplier", "addend", "shift", "zero"))
        rounding = f"QX_{op.rounding.upper()}"
        return arrays, f"qx_requantize({xs[0]}, {channels}, {inner}, {parts}, {rounding}, {op.low}, {op.high}, {y});"
    if isinstance(op, Clamp):
        return (
            arrays,
            f"qx_clamp({xs[0]}, {channels}, {inner}, {constant('low', op.low)}, {constant('high', op.high)}, {y});",
        )
    if isinstance(op, Add):
        size = math.prod(out)
        adds = [f"qx_add({x}, {size}, {int(z)}, {int(s)}, {y});" for x, z, s in zip(xs, op.zeros, op.shifts)]
        return arrays, "\n    ".join([f"memset({y}, 0, {size} * sizeof(q64));", *adds])
    if isinstance(op, Concat):
        copies, at = [], places[op.output]
        for x, name in zip(xs, op.inputs):
            size = math.prod(program.tensors[name].shape)
            copies.append(f"memcpy(memory + {at}, {x}, {size} * sizeof(q64));")
            at += size
        return arrays, "\n    ".join(copies)
    if isinstance(op, Flatten):
        return arrays, f"memmove({y}, {xs[0]}, {math.prod(out)} * sizeof(q64));"
    if isinstance(op, MaxPool | SumPool):
        dilation = op.dilation if isinstance(op, MaxPool) else (1, 1)
        window = f"(qx_window){{{_numbers((*op.window, *op.stride, *op.padding, *dilation, 1))}}}"
        zero = "" if isinstance(op, MaxPool) else constant("zero", op.zero) + ", "
        name = "qx_max_pool" if isinstance(op, MaxPool) else "qx_sum_pool"
        return arrays, f"{name}({xs[0]}, {_shape(into)}, {window}, {zero}{_shape(out)}, {y});"
    if isinstance(op, Lookup):
        table = constant("table", op.table).split(",")[0]
        return arrays, f"qx_lookup({xs[0]}, {math.prod(out)}, {table}, {op.low}, {y});"
    if isinstance(op, StridedPad):
        return (
            arrays,
            f"qx_strided_pad({xs[0]}, {_shape(into)}, {op.stride}, {op.before}, {int(op.zero[0])}, {_shape(out)}, {y});",
        )
    raise QexpError(f"export=package: {op.layer}: the operation {op.kind!r} has no C form")


def _shape(shape: tuple[int, ...]) -> str:
    c, h, w = shape if len(shape) == 3 else (shape[0], 1, 1)
    return f"(qx_shape){{{c}, {h}, {w}}}"


def _numbers(values: Iterable[int]) -> str:
    return ", ".join(str(int(v)) for v in values)


def _rows(values: Ints) -> str:
    return ", ".join(f"{{{_numbers(row)}}}" for row in values)


def _comment(text: str) -> str:
    """Returns the text, changed so that it cannot end a comment."""
    return text.replace("*/", "* /").replace("\n", " ")
