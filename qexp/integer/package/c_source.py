"""A program as C99: constant arrays, a memory plan, and one call per operation."""

from __future__ import annotations

import math

from qexp.errors import QexpError
from qexp.integer.op import Ints
from qexp.integer.package.c_calls import call
from qexp.integer.package.c_code import Code, numbers
from qexp.integer.program import Conv, IntegerProgram, Linear


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
        code = Code(
            i,
            [f"memory + {places[name]}" for name in op.inputs],
            f"memory + {places[op.output]}",
            [program.tensors[name].shape for name in op.inputs],
            program.tensors[op.output].shape,
        )
        calls.append(f"    /* {_comment(op.layer)} */\n    {call(code, op)}")
        constants += code.arrays
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


def _rows(values: Ints) -> str:
    return ", ".join(f"{{{numbers(row)}}}" for row in values)


def _comment(text: str) -> str:
    """Returns the text, changed so that it cannot end a comment."""
    return text.replace("*/", "* /").replace("\n", " ")
