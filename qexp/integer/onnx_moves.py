"""ONNX nodes of operations that only move codes."""

from __future__ import annotations

import numpy as np

from qexp.integer.moves import Concat, Flatten, Pad, Permute, Reshape, Slice, StridedPad
from qexp.integer.onnx_graph import Graph
from qexp.integer.products import Resample
from qexp.integer.program import MaxPool


def concat(graph: Graph, op: Concat) -> str:
    """Operands side by side."""
    return graph.moved(op, lambda xs: graph.node("Concat", xs, op.output, axis=op.axis + 1))


def flatten(graph: Graph, op: Flatten) -> str:
    """Maps as features."""
    return graph.moved(op, lambda xs: graph.node("Flatten", xs, op.output, axis=1))


def reshape(graph: Graph, op: Reshape) -> str:
    """The same elements in another shape."""
    shape = graph.constant(f"{op.output}.shape", np.array([-1, *op.shape], np.int64))
    return graph.moved(op, lambda xs: graph.node("Reshape", [*xs, shape], op.output))


def permute(graph: Graph, op: Permute) -> str:
    """Dimensions in another order."""
    order = [0, *(k + 1 for k in op.order)]
    return graph.moved(op, lambda xs: graph.node("Transpose", xs, op.output, perm=order))


def cut(graph: Graph, op: Slice) -> str:
    """Some entries along a dimension."""
    ends = {
        "start": op.start,
        "end": op.start + (op.count - 1) * op.step + 1,
        "axis": op.axis + 1,
        "step": op.step,
    }
    given = [graph.constant(f"{op.output}.{k}", np.array([v], np.int64)) for k, v in ends.items()]
    return graph.moved(op, lambda xs: graph.node("Slice", [*xs, *given], op.output))


def pad(graph: Graph, op: Pad) -> str:
    """A constant around a tensor."""
    (into,) = graph.sources(op)
    pads = graph.constant(f"{op.output}.pads", np.array([0, *op.before, 0, *op.after], np.int64))
    real = (op.value - int(into.zero_point.ravel()[0])) * float(into.unit.ravel()[0])
    value = graph.constant(f"{op.output}.value", np.float32(real))
    return graph.moved(op, lambda xs: graph.node("Pad", [*xs, pads, value], op.output))


def copies(graph: Graph, op: Resample) -> str:
    """Rows and columns of a map, in any order and number."""
    (into,), name = graph.sources(op), op.output
    rows, columns = op.rows[:, 0], op.columns[:, 0]
    factors = [len(at) / n for at, n in zip((rows, columns), into.shape[1:])]
    even = all(
        f == int(f) and np.array_equal(at, np.arange(len(at)) // int(f)) for f, at in zip(factors, (rows, columns))
    )

    def move(xs: list[str]) -> str:
        if even:
            scales = graph.constant(f"{name}.scales", np.array([1, 1, *factors], np.float32))
            how = {"mode": "nearest", "coordinate_transformation_mode": "asymmetric", "nearest_mode": "floor"}
            return graph.node("Resize", [*xs, "", scales], name, **how)
        places = [graph.constant(f"{name}.{k}", v) for k, v in (("rows", rows), ("columns", columns))]
        taken = graph.node("Gather", [*xs, places[0]], f"{name}.taken", axis=2)
        return graph.node("Gather", [taken, places[1]], name, axis=3)

    return graph.moved(op, move)


def max_pool(graph: Graph, op: MaxPool) -> str:
    """The greatest of each window."""
    pads = _pads(op, graph.sources(op)[0].shape, op.dilation)
    shape = {"kernel_shape": op.window, "strides": op.stride, "pads": pads, "dilations": op.dilation}
    return graph.moved(op, lambda xs: graph.node("MaxPool", xs, op.output, **shape))


def strided_pad(graph: Graph, op: StridedPad) -> str:
    """Returns the parameter-free shortcut as a convolution with ones: runtimes compute it on codes, with correct zeros.

    (OpenVINO 2026.4 leaves other numbers in channels that a `Pad` adds to 8-bit codes.)
    """
    channels, name = graph.sources(op)[0].shape[0], op.output
    weight = np.eye(op.before + channels + op.after, channels, -op.before, dtype=np.int64)[:, :, None, None]
    ones = graph.weights(f"{name}.ones", weight, "INT8", np.ones(len(weight), np.float32))
    shape = {"kernel_shape": [1, 1], "strides": [op.stride] * 2}
    return graph.moved(op, lambda xs: graph.node("Conv", [xs[0], ones], name, **shape))


def _pads(op: MaxPool, shape: tuple[int, ...], dilation: tuple[int, int]) -> list[int]:
    """Returns paddings before and behind that give as many windows as the program has (ceil mode included)."""
    behind = []
    for n, size, window, stride, pad, step in zip(op.size, shape[1:], op.window, op.stride, op.padding, dilation):
        behind.append(max((n - 1) * stride + step * (window - 1) + 1 - size - pad, 0))
    return [*op.padding, *behind]
