"""ONNX nodes of convolutions, linear layers and averages: integers added exactly and rounded once."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from qexp.errors import QexpError
from qexp.integer.arithmetic import RUNTIMES, width
from qexp.integer.onnx_graph import Graph, broadcast, kind_of, takes_pixels
from qexp.integer.program import Clamp, Conv, Linear, Requantize, SumPool, TensorSpec


def weighted(graph: Graph, op: Conv | Linear) -> str:
    """Returns the real value of a layer's sums."""
    if op.unit:
        raise QexpError(f"export=onnx: {op.layer} computes in a {op.unit['name']!r} unit, which ONNX does not have")
    (into,), out, x = graph.sources(op), graph.program.tensors[op.output], graph.real[op.inputs[0]]
    if into.unit.size > 1:
        raise QexpError(
            f"export=onnx: {op.layer}: its input has one scale per channel, which QDQ convolutions do not have; give it one: "
            f"'+quant.rules.NAME={{layers: {op.layer}, input: {{_target_: qexp.quantizers.uniform.Uniform, bits: 8}}}}'"
        )
    step = np.broadcast_to(out.unit.ravel() * 2.0**op.align / into.unit.ravel(), (len(op.weight),)).astype(np.float32)
    bits = width(min(int(op.weight.min()), -1), int(op.weight.max()))  # runtimes take signed weights
    kind = "INT4" if graph.int4 and bits <= 4 else "INT8" if bits <= 8 else "INT16"
    name = f"{op.layer or 'layer'}.{graph.number}"
    graph.bits[f"{name}.weight"] = bits
    weight = graph.weights(f"{name}.weight", op.weight, kind, step)
    whole, padding = np.rint(op.bias / 2.0**op.align).astype(np.int64), getattr(op, "padding", ())
    if into.name == graph.program.input and into.zero_point.size > 1 and takes_pixels(graph.program):
        # around them lies each channel's zero, and sums count from 0
        x, padding = _padded(graph, op, into, name), (0, 0)
        whole = whole - _of_zeros(op)
    if np.abs(whole).max(initial=0) >= 2**31:
        raise QexpError(f"export=onnx: {op.layer}: its bias needs more than the 32 bits that runtimes take")
    bias = graph.weights(f"{name}.bias", whole, "INT32", (step * into.unit.ravel()).astype(np.float32))
    if isinstance(op, Linear):
        return _rows(graph, op, x, weight, bias)
    shape = {"strides": op.stride, "pads": [*padding, *padding], "dilations": op.dilation, "group": op.groups}
    shape["kernel_shape"] = op.weight.shape[2:]
    if kind == "INT8" and x == graph.real[into.name] and _read_on_several_grids(graph, op, into):
        return _whole(graph, op, x, f"{name}.weight", whole, shape)
    return graph.node("Conv", [x, weight, bias], op.output, **shape)


def _read_on_several_grids(graph: Graph, op: Conv, into: TensorSpec) -> bool:
    """Whether several grids follow a convolution of bytes, so that runtimes would not fuse it and add its products in float."""
    behind = op.output
    while len(after := graph.readers(behind)) == 1 and isinstance(after[0], Clamp):
        behind = after[0].output
    known = graph.real[into.name].endswith(".value") and kind_of(into) == "UINT8"
    rounded = any(isinstance(r, Requantize) and r.rounding in RUNTIMES for r in graph.program.ops)
    return known and rounded and len(graph.readers(behind)) > 1 and graph.shared_grid(behind) is None


def _whole(graph: Graph, op: Conv, x: str, weight: str, bias: NDArray[np.int64], shape: dict[str, Any]) -> str:
    """Returns the real value of a convolution that is computed in whole numbers, which every grid then reads."""
    (into,), out, name = graph.sources(op), graph.program.tensors[op.output], op.output
    unit = broadcast(out.unit * 2.0**op.align, len(out.shape))
    zero = graph.integers(f"{name}.in.zero", np.int64(into.zero_point.ravel()[0]), "UINT8")
    y = graph.node("ConvInteger", [f"{x.removesuffix('.value')}.codes", weight, zero], f"{name}.products", **shape)
    summand = graph.integers(f"{name}.bias", bias.reshape(-1, *[1] * (len(out.shape) - 1)), "INT32")
    y = graph.node("Add", [y, summand], f"{name}.whole")
    y = graph.node("Cast", [y], f"{name}.float", to=graph.onnx.TensorProto.FLOAT)
    real = graph.node("Mul", [y, graph.constant(f"{name}.unit", unit)], name)
    step = np.float32(into.unit) * (out.unit * 2.0**op.align / into.unit).astype(np.float32)
    graph.sums[real] = y, broadcast(step, len(out.shape))
    return real


def _rows(graph: Graph, op: Linear, x: str, weight: str, bias: str) -> str:
    """Returns a linear layer over the last dimension: all others are rows of one matrix, which runtimes compute in integers."""
    (into,), out, name = graph.sources(op), graph.program.tensors[op.output], op.output
    if len(into.shape) == 1:
        return graph.node("Gemm", [x, weight, bias], name, transB=1)
    rows = graph.constant(f"{name}.rows.shape", np.array([-1, into.shape[-1]], np.int64))
    x = graph.kept(graph.node("Reshape", [x, rows], f"{name}.rows"), into, f"{name}.rows")
    y = graph.node("Gemm", [x, weight, bias], f"{name}.sums", transB=1)
    grid = graph.shared_grid(name)
    if grid is not None:
        y = graph.put_on(y, grid, f"{name}.ahead")
    shape = graph.constant(f"{name}.shape", np.array([-1, *out.shape], np.int64))
    y = graph.node("Reshape", [y, shape], name)
    return y if grid is None else graph.kept(y, grid, name)


def _padded(graph: Graph, op: Conv, into: TensorSpec, name: str) -> str:
    """Returns the real value of pixels with each channel's zero around them."""
    (up, left), zeros = op.padding, into.zero_point
    if not up and not left:
        return graph.real[into.name]
    names = [f"{name}.channel{c}" for c in range(len(zeros))]
    parts = graph.constant(f"{name}.parts", np.ones(len(zeros), np.int64))
    graph.nodes.append(
        graph.onnx.helper.make_node("Split", [f"{into.name}.codes", parts], names, name=f"{name}.split", axis=1)
    )
    pads = graph.constant(f"{name}.pads", np.array([0, 0, up, left, 0, 0, up, left], np.int64))
    around = [
        graph.node("Pad", [channel, pads, graph.integers(f"{channel}.zero", np.int64(z), "UINT8")], f"{channel}.padded")
        for channel, z in zip(names, zeros)
    ]
    codes = graph.node("Concat", around, f"{name}.padded", axis=1) if len(around) > 1 else around[0]
    return graph.node("DequantizeLinear", [codes, f"{into.name}.scale", f"{into.name}.zero"], f"{name}.padded.value")


def _of_zeros(op: Conv) -> NDArray[np.int64]:
    """Returns the excess of a convolution's sums when its input counts from 0 and not from each channel's zero."""
    outputs, per = op.weight.shape[:2]
    zero = np.repeat(op.zero.reshape(op.groups, per), outputs // op.groups, axis=0)
    return (op.weight.sum((2, 3)) * zero).sum(1)


def average(graph: Graph, op: SumPool) -> str:
    """Returns the real value of an average, or of a multiple of it."""
    (into,), out, x, name = graph.sources(op), graph.program.tensors[op.output], graph.real[op.inputs[0]], op.output
    count = np.prod(op.window)
    if kind_of(into) in ("UINT8", "INT8") and into.unit.size == 1 and np.allclose(count * out.unit, into.unit):
        return _as_convolution(graph, op, x, name, into.shape[0])
    if op.window == into.shape[1:] and not any(op.padding):
        mean = graph.node("GlobalAveragePool", [x], f"{name}.mean")
    else:
        pads = [*op.padding, *op.padding]
        shape = {"kernel_shape": op.window, "strides": op.stride, "pads": pads, "count_include_pad": 1}
        mean = graph.node("AveragePool", [x], f"{name}.mean", **shape)
    factor = count * out.unit / into.unit
    if np.allclose(factor, 1, rtol=1e-6):
        return mean
    return graph.node("Mul", [mean, graph.constant(f"{name}.factor", broadcast(factor, len(out.shape)))], name)


def _as_convolution(graph: Graph, op: SumPool, x: str, name: str, channels: int) -> str:
    """Returns an average of 8-bit codes as a convolution of each channel with ones: runtimes add whole numbers and round once.

    (OpenVINO 2026.4 rounds an average of codes before it rescales it; onnxruntime averages floats where windows are small.)
    """
    weight = np.ones((channels, 1, *op.window), np.int64)
    part = np.full(channels, 1 / np.prod(op.window), np.float32)
    ones = graph.weights(f"{name}.ones", weight, "INT8", part)
    shape = {"kernel_shape": op.window, "strides": op.stride, "pads": [*op.padding, *op.padding], "group": channels}
    return graph.node("Conv", [x, ones], name, **shape)
