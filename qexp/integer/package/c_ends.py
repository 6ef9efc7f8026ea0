"""The two ends of a program as C99: pixels to codes by table, codes of scores to real scores, and the prediction."""

from __future__ import annotations

import json
import math

import numpy as np

from qexp.integer.ends import described, pixel_codes
from qexp.integer.program import IntegerProgram


def ends(program: IntegerProgram) -> str:
    """Returns `ends.h`: `network_encode` (if the preparation of pixels is known), `network_decode`, `network_argmax`."""
    start, end = program.tensors[program.input], program.tensors[program.output]
    about = json.dumps(described(program)["input"]["preprocessing"]).replace("*/", "* /")
    lines = [
        f"/* pixels are prepared as {about} */",
        "#ifndef NETWORK_ENDS_H",
        "#define NETWORK_ENDS_H",
        '#include "network.h"',
        "",
    ]
    codes = pixel_codes(program)
    if codes is not None:
        area = math.prod(start.shape[1:])
        rows = ",\n    ".join("{" + ", ".join(map(str, row.tolist())) + "}" for row in codes)
        lines += [
            f"static const int16_t network_pixel_codes[{len(codes)}][256] = {{\n    {rows}}};",
            "",
            f"/* codes of an image's bytes, {' x '.join(map(str, start.shape))}, channels first */",
            "static inline void network_encode(const uint8_t *pixels, q64 *codes) {",
            f"    for (long i = 0; i < NETWORK_INPUT; i++) codes[i] = network_pixel_codes[i / {area}][pixels[i]];",
            "}",
            "",
        ]
    unit, zero = (np.broadcast_to(v, (max(end.unit.size, 1),)) for v in (end.unit, end.zero_point))
    place = "i" if end.unit.size > 1 else "0"
    lines += [
        f"static const double network_unit[] = {{{', '.join(repr(float(u)) for u in unit)}}};",
        f"static const q64 network_zero[] = {{{', '.join(str(int(z)) for z in zero)}}};",
        "",
        "/* the real value of score i */",
        "static inline double network_decode(const q64 *output, int i) {",
        *(["    (void)i;"] if place == "0" else []),
        f"    return (double)(output[i] - network_zero[{place}]) * network_unit[{place}];",
        "}",
        "",
        "/* the prediction: the first of the greatest scores */",
        "static inline int network_argmax(const q64 *output) {",
        "    int best = 0;",
        "    for (int i = 1; i < NETWORK_OUTPUT; i++)",
        "        if (network_decode(output, i) > network_decode(output, best)) best = i;",
        "    return best;",
        "}",
        "#endif",
        "",
    ]
    return "\n".join(lines)
