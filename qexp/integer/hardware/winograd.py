"""The Winograd unit: 3x3 convolutions on transformed integers of 16 bits, of which those that do not fit saturate.

Source: TF2-Engine's int8 engine; Lavin and Gray 2015 (arXiv 1509.09308). The matrices have their denominators cleared.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from qexp_kernels.winograd.matrices import MATRICES

from qexp.errors import QexpError
from qexp.integer.program import Conv, IntegerProgram, Linear, channels

Ints = NDArray[np.int64]
_LOW, _HIGH = -(1 << 15), (1 << 15) - 1


def unit(program: IntegerProgram, op: Conv | Linear, options: dict[str, Any]) -> dict[str, Any] | None:
    """Returns the unit of a layer; None for layers with other kernels, strides or groups."""
    how = {"outputs": 4, "two_d": False, "clamp_int16": True} | options
    if set(how) != {"outputs", "two_d", "clamp_int16"} or how["outputs"] not in MATRICES:
        raise QexpError(f"winograd: {options} is not allowed; use outputs (2, 4, 5), two_d and clamp_int16")
    return how if isinstance(op, Conv) and suits(op, program.tensors[op.inputs[0]].shape) else None


def suits(op: Conv, shape: tuple[int, ...]) -> bool:
    """Whether a convolution of an input `[C, H, W]` is one of 3x3, stride 1 and one group."""
    room = min(n + 2 * p for n, p in zip(shape[1:], op.padding))
    return op.weight.shape[2:] == (3, 3) and (op.stride, op.dilation, op.groups) == ((1, 1), (1, 1), 1) and room >= 3


def lossless(op: Conv, reach: int) -> bool:
    """Whether nothing can saturate for inputs up to `reach`, so that the sums equal those of an ordinary convolution."""
    m, how = MATRICES[op.unit["outputs"]], op.unit
    widest = max(sum(map(abs, row)) for row in m.bt)
    inputs = reach * (widest**2 if how["two_d"] else widest)
    return not how["clamp_int16"] or (inputs <= _HIGH and int(np.abs(_kernels(op, how)).max(initial=0)) <= _HIGH)


def _kernels(op: Conv, how: dict[str, Any]) -> Ints:
    """Returns the transformed kernels, before they saturate: [O, C, 3 or n, n]."""
    g = np.array(MATRICES[how["outputs"]].g, np.int64)
    u = op.weight @ g.T
    return np.einsum("ia,ocab->ocib", g, u) if how["two_d"] else u


def sums(op: Conv, x: Ints, register: Any) -> Ints:
    """Returns the sums: kernels and tiles transformed, saturated to 16 bits, multiplied, added, transformed back, divided by D or D^2."""
    how = op.unit
    m = MATRICES[how["outputs"]]
    bt, at = np.array(m.bt, np.int64), np.array(m.at, np.int64)
    tile, reach = how["outputs"], how["outputs"] + 2
    (ph, pw), (height, width) = op.padding, x.shape[2:]
    rows, columns = height + 2 * ph - 2, width + 2 * pw - 2
    across, down = -(-columns // tile), -(-rows // tile) if how["two_d"] else rows
    bottom = down * tile + 2 - height - ph if how["two_d"] else ph
    x = np.pad(x, ((0, 0), (0, 0), (ph, bottom), (pw, across * tile + 2 - width - pw)))
    lost = 0

    def held(values: Ints) -> Ints:
        nonlocal lost
        if not how["clamp_int16"]:
            return values
        lost += int(((values < _LOW) | (values > _HIGH)).sum())
        return values.clip(_LOW, _HIGH)

    seen = np.lib.stride_tricks.sliding_window_view(x, reach, axis=3)[:, :, :, ::tile]  # [N, C, H, tiles, n]
    u = held(_kernels(op, how))
    if how["two_d"]:
        # [N, C, down, tiles, n, n of rows].
        seen = np.lib.stride_tricks.sliding_window_view(seen, reach, axis=2)[:, :, ::tile]
        v = held(np.einsum("ia,jb,nchwba->nchwij", bt, bt, seen))
        total = np.einsum("nchwij,ocij->nohwij", v, u)
        y = np.einsum("pi,qj,nohwij->nohpwq", at, at, total)
        divisor = m.divisor**2
    else:
        v = held(seen @ bt.T)
        total = sum(np.einsum("nchwj,ocj->nohwj", v[:, :, r : r + down], u[:, :, r]) for r in range(3))
        y, divisor = total @ at.T, m.divisor
    y = np.where(y < 0, -(-y // divisor), y // divisor)  # toward zero; without saturation nothing is left over
    y = y.reshape(len(x), len(op.weight), -1, across * tile)[:, :, :rows, :columns]
    register.overflows[op.layer] = register.overflows.get(op.layer, 0) + lost
    y = register.held(op.layer, y) if register.bits < 64 else y
    return (y << op.align) + channels(op.bias, 4)
