"""ONNX nodes of sums, products, multiples, tables, and weighted sums of neighbours."""

from __future__ import annotations

import numpy as np

from qexp.errors import QexpError
from qexp.integer.onnx_graph import IN_FLOAT, Graph, broadcast, kind_of
from qexp.integer.onnx_moves import copies
from qexp.integer.products import Affine, MatMul, Multiply, Resample
from qexp.integer.program import Add, Lookup, Requantize, TensorSpec
from qexp.integer.reference import requantize


def add(graph: Graph, op: Add) -> str:
    """A sum of real values."""
    total, *rest = (graph.real[name] for name in op.inputs)
    for k, x in enumerate(rest):
        total = graph.node("Add", [total, x], op.output if k == len(rest) - 1 else f"{op.output}.{k}")
    return total


def multiply(graph: Graph, op: Multiply) -> str:
    """A product of real values, which runtimes compute on 8-bit codes."""
    return graph.node("Mul", [graph.real[name] for name in op.inputs], op.output)


def matmul(graph: Graph, op: MatMul) -> str:
    """A product of matrices, which runtimes compute on 8-bit codes."""
    return graph.node("MatMul", [graph.real[name] for name in op.inputs], op.output)


def affine(graph: Graph, op: Affine) -> str:
    """A multiple and a summand."""
    (into,), out, name = graph.sources(op), graph.program.tensors[op.output], op.output
    dims = len(out.shape)
    units = [_spread(spec.unit, spec.axis, dims) for spec in (into, out)]
    factor = op.factor * 2.0**op.shift * units[1] / units[0]
    summand = op.bias * units[1]
    y = graph.real[op.inputs[0]]
    if not np.allclose(factor, 1, rtol=1e-7):
        y = graph.node("Mul", [y, graph.constant(f"{name}.factor", factor.astype(np.float32))], f"{name}.multiple")
    if summand.any():
        y = graph.node("Add", [y, graph.constant(f"{name}.summand", summand.astype(np.float32))], f"{name}.sum")
    return y


def _spread(values: np.ndarray, axis: int, dims: int) -> np.ndarray:
    return values.reshape([-1 if k == axis else 1 for k in range(dims)]) if values.size > 1 else values.reshape(())


def lookup(graph: Graph, op: Lookup) -> str:
    """An entry of a table, which the code of the input names; a row per channel follows the others."""
    out = graph.program.tensors[op.output]
    zero, scale = (np.reshape(v, (-1, 1)) for v in (out.zero_point, out.unit))
    values = (np.atleast_2d(op.table) - zero) * scale
    if len(values) != len(np.atleast_2d(op.table)):  # the channels share the codes of a table, and not their scale
        raise QexpError(f"export=onnx: {op.layer}: its output has one scale per channel; use granularity: tensor there")
    if all(isinstance(reader, Requantize) for reader in graph.readers(op.output)) and op.output != graph.program.output:
        return ""  # each reader has a table of its own codes
    return _entries(graph, op, values, op.output)


def looked_up(graph: Graph, op: Requantize, maker: Lookup, grid: TensorSpec) -> str:
    """The requantized entry of a table: the table holds the values of the codes themselves, so that no runtime rounds them anew."""
    table = np.atleast_2d(maker.table)
    codes = requantize(op, table.T[:, :, None, None] if len(table) > 1 else table.reshape(-1, 1, 1, 1))[:, :, 0, 0].T
    values = (codes - int(grid.zero_point[0])) * float(grid.unit[0])
    return _entries(graph, maker, values, f"{op.output}.entry")


def _entries(graph: Graph, op: Lookup, values: np.ndarray, name: str) -> str:
    """Returns the entries of a table `[rows, codes]` of real values."""
    if values.size >= 2**24:
        raise QexpError(
            f"export=onnx: {op.layer}: its table of {values.size} entries is too large; give its input 8 bits"
        )
    table = graph.constant(f"{name}.table", values.astype(np.float32).ravel())
    return graph.node("Gather", [table, _places(graph, op)], name)


def _places(graph: Graph, op: Lookup) -> str:
    """Returns the places of the entries of a table, computed once."""
    (into,), name = graph.sources(op), f"{op.output}.index"
    if name in graph.named:
        return name
    dims, (rows, entries) = len(into.shape), np.atleast_2d(op.table).shape
    unit = graph.constant(f"{op.output}.unit", broadcast(into.unit, dims, into.axis))
    first = np.arange(rows) * entries if rows > 1 else np.zeros(1)
    first = _spread(first, op.axis, dims) + _spread(into.zero_point - op.low, into.axis, dims)
    shift = graph.constant(f"{op.output}.shift", first.astype(np.float32))
    steps = graph.node("Div", [graph.real[op.inputs[0]], unit], f"{op.output}.steps")
    place = graph.node("Add", [graph.node("Round", [steps], f"{op.output}.whole"), shift], f"{op.output}.place")
    return graph.node("Cast", [place], name, to=graph.onnx.TensorProto.INT64)


def resample(graph: Graph, op: Resample) -> str:
    """Copies, or a whole multiple of a map's size as a convolution that makes all pixels of a place at once."""
    if op.copies:
        return copies(graph, op)
    (into,), out, name = graph.sources(op), graph.program.tensors[op.output], op.output
    phases = [
        _phases(*each)
        for each in ((op.rows, op.row_weights, into.shape[1]), (op.columns, op.column_weights, into.shape[2]))
    ]
    if any(p is None for p in phases) or phases[0].shape != phases[1].shape:
        raise QexpError(
            f"export=onnx: {op.layer}: runtimes interpolate {IN_FLOAT}; mode=nearest, and a factor of 2 in both directions, have "
            "an integer form"
        )
    kernel = np.einsum("pa,qb->pqab", *phases)
    f, reach = len(phases[0]), phases[0].shape[1] // 2
    if np.abs(kernel).max() > 127 or kind_of(into) not in ("UINT8", "INT8") or into.unit.size > 1:
        raise QexpError(
            f"export=onnx: {op.layer}: runtimes interpolate by a factor of {f} {IN_FLOAT}; use a factor of 2 and 8 bits at its input"
        )
    channels = into.shape[0]
    pads = graph.constant(f"{name}.pads", np.array([0, 0, reach, reach] * 2, np.int64))
    x = graph.node("Pad", [graph.real[op.inputs[0]], pads], f"{name}.border", mode="edge")
    x = graph.kept(x, into, f"{name}.border")
    weight = np.tile(kernel.reshape(f * f, 1, *kernel.shape[2:]), (channels, 1, 1, 1))
    step = np.full(len(weight), float(out.unit[0]) / float(into.unit[0]), np.float32)
    y = graph.node(
        "Conv",
        [x, graph.weights(f"{name}.taps", weight, "INT8", step)],
        f"{name}.sums",
        kernel_shape=weight.shape[2:],
        group=channels,
    )
    grid = graph.shared_grid(name)
    if grid is not None:
        y = graph.put_on(y, grid, f"{name}.ahead")
    y = graph.node("DepthToSpace", [y], name, blocksize=f, mode="CRD")
    return y if grid is None else graph.kept(y, grid, name)


def _phases(places: np.ndarray, weights: np.ndarray, size: int) -> np.ndarray | None:
    """Returns the weights of the neighbours of a place for each of its f results `[f, 2 reach + 1]`; None if they differ between places."""
    f, rest = divmod(len(places), size)
    if rest or not f:
        return None
    dense = np.zeros((len(places), size), np.int64)
    np.add.at(dense, (np.arange(len(places))[:, None], places), weights)
    for reach in (1, 2):
        place = min(max(reach, 0), size - 1)
        if size < 2 * reach + 1:
            return None
        taken = dense[place * f : (place + 1) * f, : 2 * reach + 1]
        again = np.zeros_like(dense)
        for i in range(size):  # beyond the border the outermost pixel is repeated
            at = np.clip(np.arange(i - reach, i + reach + 1), 0, size - 1)
            for p in range(f):
                np.add.at(again, (i * f + p, at), taken[p])
        if np.array_equal(again, dense):
            return taken
    return None
