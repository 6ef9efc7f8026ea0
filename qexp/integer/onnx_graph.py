"""The nodes of a program's ONNX file, made operation by operation."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qexp.errors import QexpError
from qexp.integer.arithmetic import width
from qexp.integer.ends import described, normalized_pixels
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
from qexp.numerics.packing import pack

OPSET = 21  # the first with int4 and 16-bit grids
KINDS = {"UINT8": (0, 255), "INT8": (-128, 127), "UINT16": (0, 65535), "INT16": (-32768, 32767)}
STORED = {"UINT8": "u1", "INT8": "i1", "UINT16": "u2", "INT16": "i2", "INT32": "i4"}
MOVERS = (
    Concat,
    Flatten,
    MaxPool,
    StridedPad,
)  # no code is changed, so they may come before a requantization or after it


class Graph:
    """Nodes and constants of one program; `model()` makes them.

    Args:
        program: What to write.
        int4: Store weights of up to 4 bits two to a byte; some importers do not read them, and onnxruntime computes such layers in float.
    """

    def __init__(self, program: IntegerProgram, int4: bool = False) -> None:
        import onnx

        self.onnx, self.program, self.int4 = onnx, program, int4
        self.nodes: list[Any] = []
        self.constants: dict[str, Any] = {}
        self.bits: dict[str, int] = {}
        self.codes: dict[str, str] = {}  # by tensor of the program on a grid: the name of its codes
        self.real: dict[str, str] = {}  # by tensor of the program: the name of its real value
        self.unclamped: dict[
            str, tuple[str, Clamp]
        ] = {}  # by clamped tensor: the real value before the clamp, if clamps come after grids
        self.quantized: dict[tuple, str] = {}  # by tensor and grid: its value on that grid, for reuse

    def model(self) -> Any:
        """Returns the finished ONNX model."""
        helper, program = self.onnx.helper, self.program
        start, end = program.tensors[program.input], program.tensors[program.output]
        pixels = takes_pixels(program)
        self.real[start.name] = (
            self._pixels(start) if pixels else self._quantized(self._images(start), start, start.name)
        )
        for i, op in enumerate(program.ops):
            self.real[op.output] = self._op(i, op)
        values = {start.name: self.real[start.name]}
        values |= {op.output: self.real[op.output] for op in program.ops if isinstance(op, Requantize) and _kind(op)}
        self.codes = {name: value.removesuffix(".value") + ".codes" for name, value in values.items()}
        self._node("Identity", [self.real[end.name]], "scores")
        kind = self.onnx.TensorProto.FLOAT
        graph = helper.make_graph(
            self.nodes,
            "qexp",
            [helper.make_tensor_value_info(*self._input(), ["N", *start.shape])],
            [helper.make_tensor_value_info("scores", kind, ["N", *end.shape])],
            list(self.constants.values()),
        )
        model = helper.make_model(
            graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=10, producer_name="qexp"
        )
        ends = described(program)
        notes = {"bits": self.bits, "codes": self.codes, "about": program.about}
        notes |= {"input": {"name": self._input()[0]} | ends["input"], "output": {"name": "scores"} | ends["output"]}
        helper.set_model_props(model, {f"qexp.{k}": json.dumps(v, default=str) for k, v in notes.items()})
        return model

    def _input(self) -> tuple[str, int]:
        """Returns name and type of what the file takes."""
        kinds = self.onnx.TensorProto
        return ("pixels", kinds.UINT8) if takes_pixels(self.program) else ("images", kinds.FLOAT)

    def _pixels(self, grid: TensorSpec) -> str:
        """Returns the real value of pixels, which are codes as they come; where channels have zeros of their own, of `pixel - 0`."""
        self._node("Identity", ["pixels"], f"{grid.name}.codes")
        self.bits[grid.name] = 8
        scale = self._constant(f"{grid.name}.scale", np.float32(grid.unit[0]))
        zero = grid.zero_point[0] if grid.zero_point.size == 1 else 0
        point = self._integers(f"{grid.name}.zero", np.int64(zero), "UINT8")
        return self._node("DequantizeLinear", [f"{grid.name}.codes", scale, point], f"{grid.name}.value")

    def _padded(self, op: Conv, into: TensorSpec, name: str) -> str:
        """Returns the real value of pixels with each channel's zero around them."""
        (up, left), zeros = op.padding, into.zero_point
        if not up and not left:
            return self.real[into.name]
        names = [f"{name}.channel{c}" for c in range(len(zeros))]
        parts = self._constant(f"{name}.parts", np.ones(len(zeros), np.int64))
        self.nodes.append(
            self.onnx.helper.make_node("Split", [f"{into.name}.codes", parts], names, name=f"{name}.split", axis=1)
        )
        pads = self._constant(f"{name}.pads", np.array([0, 0, up, left, 0, 0, up, left], np.int64))
        around = [
            self._node(
                "Pad", [channel, pads, self._integers(f"{channel}.zero", np.int64(z), "UINT8")], f"{channel}.padded"
            )
            for channel, z in zip(names, zeros)
        ]
        codes = self._node("Concat", around, f"{name}.padded", axis=1) if len(around) > 1 else around[0]
        return self._node(
            "DequantizeLinear", [codes, f"{into.name}.scale", f"{into.name}.zero"], f"{name}.padded.value"
        )

    def _images(self, grid: TensorSpec) -> str:
        """Returns the images, already on the grid where `QuantizeLinear` alone would give other codes: it adds the zero point last.

        The difference is at ties, where an odd zero point makes another neighbour even; pixels with mean = std = 1/2 are all ties.
        """
        if grid.unit.size > 1 or grid.zero_point.size > 1 or not self._order_matters(grid):
            return "images"
        unit, zero, low, high = (
            self._constant(f"images.{name}", np.float32(v))
            for name, v in (
                ("unit", grid.unit[0]),
                ("zero", grid.zero_point[0]),
                ("low", grid.low),
                ("high", grid.high),
            )
        )
        x = self._node("Add", [self._node("Div", ["images", unit], "images.steps"), zero], "images.place")
        x = self._node("Round", [self._node("Clip", [x, low, high], "images.clipped")], "images.whole")
        return self._node("Mul", [self._node("Sub", [x, zero], "images.apart"), unit], "images.real")

    def _order_matters(self, grid: TensorSpec) -> bool:
        """Whether a pixel has other codes when the zero point is added after rounding; of unknown pixels, whether one could."""
        pixels = normalized_pixels(self.program.about.get("preprocessing"))
        if pixels is None:
            return bool(grid.zero_point[0] % 2)
        steps = pixels / np.float32(grid.unit[0])
        after = np.clip(np.rint(steps) + grid.zero_point[0], grid.low, grid.high)
        return not np.array_equal(after, self.program.encode(pixels))

    def _op(self, i: int, op: Op) -> str:
        xs = [self.real[name] for name in op.inputs]
        name, out = op.output, self.program.tensors[op.output]
        if isinstance(op, Conv | Linear):
            return self._weighted(i, op, xs[0])
        if isinstance(op, MOVERS):
            return self._moved(op, xs, name, out)
        if isinstance(op, Requantize):
            return self._on_grid(op.inputs[0], replace(out, low=op.low, high=op.high), name)
        if isinstance(op, Clamp):
            if None not in self._grids(op.output):
                self.unclamped[op.output] = xs[0], op
                return xs[0]
            return self._clamp(op, xs[0], name)
        if isinstance(op, Add):
            total = xs[0]
            for k, x in enumerate(xs[1:]):
                total = self._node("Add", [total, x], name if k == len(xs) - 2 else f"{name}.{k}")
            return total
        if isinstance(op, SumPool):
            return self._average(op, xs[0], name, out)
        if isinstance(op, Lookup):
            return self._lookup(op, xs[0], name, out)
        raise QexpError(f"export=onnx: {op.layer}: the operation {op.kind!r} has no ONNX form")

    def _clamp(self, op: Clamp, x: str, name: str) -> str:
        source = self.program.tensors[op.inputs[0]]
        zero, unit = source.zero_point, source.unit
        if np.array_equal(op.low, zero) and op.high.min() >= source.high:
            return self._node("Relu", [x], name)
        dims = len(source.shape)
        low = self._constant(f"{name}.low", _broadcast((op.low - zero) * unit, dims))
        high = self._constant(f"{name}.high", _broadcast((op.high - zero) * unit, dims))
        return self._node("Min", [self._node("Max", [x, low], f"{name}.least"), high], name)

    def _on_grid(self, tensor: str, grid: TensorSpec, name: str) -> str:
        """Returns the real value of a tensor on a grid of one scale; a clamp before it moves behind it, unless the grid's ends do the same.

        Rounding is monotonic, so both give the same codes, and runtimes fuse a layer with the quantize node right behind it.
        """
        if tensor not in self.unclamped:
            return self._quantized(self.real[tensor], grid, name)
        x, clamp = self.unclamped[tensor]
        if self._ends_within(grid, clamp):
            return self._quantized(x, grid, name)
        key = tensor, *_key(grid)
        if key not in self.quantized:
            free = self._quantized(x, grid, f"{name}.free")
            self.quantized[key] = self._quantized(self._clamp(clamp, free, f"{name}.clamped"), grid, name)
        return self.quantized[key]

    def _ends_within(self, grid: TensorSpec, clamp: Clamp) -> bool:
        """Whether a grid lies within a clamp's limits."""
        source = self.program.tensors[clamp.inputs[0]]
        low, high = ((end - grid.zero_point) * grid.unit for end in (grid.low, grid.high))
        least, most = ((end - source.zero_point) * source.unit for end in (clamp.low, clamp.high))
        return low.min() >= least.max() and (high.max() <= most.min() or clamp.high.min() >= source.high)

    def _constants(self, name: str, whole: NDArray[np.int64], kind: str, step: NDArray[np.float32]) -> str:
        """Returns the real value of integer weights or biases; with zero points, without which runtimes do not fuse linear layers."""
        scale = self._constant(f"{name}.scale", step)
        zero = self._integers(f"{name}.zero", np.zeros(len(step), np.int64), kind)
        return self._node("DequantizeLinear", [self._integers(name, whole, kind), scale, zero], f"{name}.real", axis=0)

    def _grids(self, name: str) -> list[TensorSpec | None]:
        """Returns the grids of a tensor's readers, looking through operations that only move codes; None for a reader without one."""
        found: list[TensorSpec | None] = [None] if name == self.program.output else []
        for reader in (op for op in self.program.ops if name in op.inputs):
            grid = self.program.tensors[reader.output]
            if isinstance(reader, Requantize):
                fits = grid.unit.size == 1 and grid.zero_point.size == 1 and _kind(grid) is not None
                found.append(replace(grid, low=reader.low, high=reader.high) if fits else None)
            elif isinstance(reader, MOVERS):
                found.append(self._ahead(reader))
            else:
                found.append(None)
        return found

    def _ahead(self, op: Op) -> TensorSpec | None:
        """Returns the grid that all readers of a mover's result share, so that codes can be moved; None if they share none."""
        grids = self._grids(op.output)
        if None in grids or len({_key(g) for g in grids}) != 1:
            return None
        return grids[0]

    def _moved(self, op: Op, xs: list[str], name: str, out: TensorSpec) -> str:
        """Returns an operation that only moves codes (a maximum, a shortcut, a concatenation), on 8-bit codes if this is exact.

        Runtimes fuse a layer with the quantize node behind it. So that node is placed before the moving operation and again behind it.
        """
        ahead = self._ahead(op)
        if ahead is not None:
            names = [f"{name}.ahead{k}" if k else f"{name}.ahead" for k in range(len(xs))]
            xs = [self._on_grid(tensor, ahead, ahead_of) for tensor, ahead_of in zip(op.inputs, names)]
        if isinstance(op, Concat | Flatten):
            y = self._node(type(op).__name__, xs, name, axis=1)
        elif isinstance(op, MaxPool):
            pads = _pads(op, self.program.tensors[op.inputs[0]].shape, op.dilation)
            shape = {"kernel_shape": op.window, "strides": op.stride, "pads": pads, "dilations": op.dilation}
            y = self._node("MaxPool", xs, name, **shape)
        else:
            y = self._strided_pad(op, xs[0], name)
        grid = ahead or out
        if grid.unit.size > 1 or grid.zero_point.size > 1 or _kind(grid) not in ("UINT8", "INT8"):
            return y
        low, high = KINDS[_kind(grid)]  # the grid uses all codes of its type: no clip is needed
        y = self._quantized(y, replace(grid, low=low, high=high), f"{name}.kept")
        self.quantized[y, *_key(grid)] = y
        return y

    def _weighted(self, i: int, op: Conv | Linear, x: str) -> str:
        if op.unit:
            raise QexpError(f"export=onnx: {op.layer} computes in a {op.unit['name']!r} unit, which ONNX does not have")
        into, out = self.program.tensors[op.inputs[0]], self.program.tensors[op.output]
        if into.unit.size > 1:
            raise QexpError(
                f"export=onnx: {op.layer}: its input has one scale per channel, which QDQ convolutions do not have"
            )
        step = np.broadcast_to(out.unit.ravel() * 2.0**op.align / into.unit.ravel(), (len(op.weight),)).astype(
            np.float32
        )
        bits = _bits(op.weight)
        kind = "INT4" if self.int4 and bits <= 4 else "INT8" if bits <= 8 else "INT16"
        name = f"{op.layer or 'layer'}.{i}"
        self.bits[f"{name}.weight"] = bits
        weight = self._constants(f"{name}.weight", op.weight, kind, step)
        whole, padding = np.rint(op.bias / 2.0**op.align).astype(np.int64), getattr(op, "padding", ())
        if into.name == self.program.input and into.zero_point.size > 1 and takes_pixels(self.program):
            x, padding = (
                self._padded(op, into, name),
                (0, 0),
            )  # around them lies each channel's zero, and sums count from 0
            whole = whole - _of_zeros(op)
        if np.abs(whole).max(initial=0) >= 2**31:
            raise QexpError(f"export=onnx: {op.layer}: its bias needs more than the 32 bits that runtimes take")
        bias = self._constants(f"{name}.bias", whole, "INT32", (step * into.unit.ravel()).astype(np.float32))
        if isinstance(op, Linear):
            return self._node("Gemm", [x, weight, bias], op.output, transB=1)
        pads = [*padding, *padding]
        shape = {"strides": op.stride, "pads": pads, "dilations": op.dilation, "group": op.groups}
        return self._node("Conv", [x, weight, bias], op.output, kernel_shape=op.weight.shape[2:], **shape)

    def _quantized(self, x: str, spec: TensorSpec, name: str) -> str:
        """Returns the real value of `x` after it is put on a grid; as it is, where the grid has more than 16 bits."""
        if spec.unit.size > 1 or spec.zero_point.size > 1:
            raise QexpError(
                f"export=onnx: {name}: a scale for each channel of activations has no QDQ form that runtimes take"
            )
        unit, zero = float(spec.unit.ravel()[0]), int(spec.zero_point.ravel()[0])
        kind = _kind(spec)
        if kind is None:
            return x
        key = x, *_key(spec)
        if key in self.quantized:
            return self.quantized[key]
        self.bits[name] = width(spec.low, spec.high)
        low, high = KINDS[kind]
        if (low, high) != (
            spec.low,
            spec.high,
        ):  # on all codes of the type first, so that runtimes fuse; the ends then come off
            x = self._quantized(x, replace(spec, low=low, high=high), f"{name}.all")
            ends = [
                self._constant(f"{name}.{k}", np.float32((v - zero) * unit))
                for k, v in (("low", spec.low), ("high", spec.high))
            ]
            x = self._node("Clip", [x, *ends], f"{name}.clipped")
        scale = self._constant(f"{name}.scale", np.float32(unit))
        point = self._integers(f"{name}.zero", np.int64(min(max(zero, KINDS[kind][0]), KINDS[kind][1])), kind)
        if not KINDS[kind][0] <= zero <= KINDS[kind][1]:
            raise QexpError(f"export=onnx: {name}: its zero point {zero} lies outside {kind.lower()}")
        codes = self._node("QuantizeLinear", [x, scale, point], f"{name}.codes")
        self.quantized[key] = self._node("DequantizeLinear", [codes, scale, point], f"{name}.value")
        return self.quantized[key]

    def _average(self, op: SumPool, x: str, name: str, out: TensorSpec) -> str:
        into = self.program.tensors[op.inputs[0]]
        if (
            _kind(into) in ("UINT8", "INT8")
            and into.unit.size == 1
            and np.allclose(np.prod(op.window) * out.unit, into.unit)
        ):
            return self._as_convolution(op, x, name, into.shape[0])
        if op.window == into.shape[1:] and not any(op.padding):
            mean = self._node("GlobalAveragePool", [x], f"{name}.mean")
        else:
            pads = [*op.padding, *op.padding]
            shape = {"kernel_shape": op.window, "strides": op.stride, "pads": pads, "count_include_pad": 1}
            mean = self._node("AveragePool", [x], f"{name}.mean", **shape)
        factor = np.prod(op.window) * out.unit / into.unit
        if np.allclose(factor, 1, rtol=1e-6):
            return mean
        return self._node("Mul", [mean, self._constant(f"{name}.factor", _broadcast(factor, len(out.shape)))], name)

    def _as_convolution(self, op: SumPool, x: str, name: str, channels: int) -> str:
        """Returns an average of 8-bit codes as a convolution of each channel with ones: runtimes add whole numbers and round once.

        (OpenVINO 2026.4 rounds an average of codes before it rescales it; onnxruntime averages floats where windows are small.)
        """
        weight = np.ones((channels, 1, *op.window), np.int64)
        part = np.full(channels, 1 / np.prod(op.window), np.float32)
        ones = self._constants(f"{name}.ones", weight, "INT8", part)
        shape = {"kernel_shape": op.window, "strides": op.stride, "pads": [*op.padding, *op.padding], "group": channels}
        return self._node("Conv", [x, ones], name, **shape)

    def _strided_pad(self, op: StridedPad, x: str, name: str) -> str:
        """Returns the parameter-free shortcut as a convolution with ones: runtimes compute it on codes, with correct zeros.

        (OpenVINO 2026.4 leaves other numbers in channels that a `Pad` adds to 8-bit codes.)
        """
        channels = self.program.tensors[op.inputs[0]].shape[0]
        weight = np.eye(op.before + channels + op.after, channels, -op.before, dtype=np.int64)[:, :, None, None]
        ones = self._constants(f"{name}.ones", weight, "INT8", np.ones(len(weight), np.float32))
        return self._node("Conv", [x, ones], name, kernel_shape=[1, 1], strides=[op.stride] * 2)

    def _lookup(self, op: Lookup, x: str, name: str, out: TensorSpec) -> str:
        into = self.program.tensors[op.inputs[0]]
        if into.unit.size > 1 or out.unit.size > 1:
            raise QexpError(
                f"export=onnx: {op.layer}: a table over tensors with a scale for each channel has no ONNX form here"
            )
        unit = self._constant(f"{name}.unit", np.float32(into.unit.ravel()[0]))
        shift = self._constant(f"{name}.shift", np.float32(int(into.zero_point.ravel()[0]) - op.low))
        place = self._node("Add", [self._node("Div", [x, unit], f"{name}.steps"), shift], f"{name}.place")
        index = self._node(
            "Cast", [self._node("Round", [place], f"{name}.whole")], f"{name}.index", to=self.onnx.TensorProto.INT64
        )
        values = ((op.table - out.zero_point.ravel()[0]) * out.unit.ravel()[0]).astype(np.float32)
        return self._node("Gather", [self._constant(f"{name}.table", values), index], name)

    def _node(self, kind: str, inputs: Sequence[str], output: str, **options: Any) -> str:
        options = {k: list(v) if isinstance(v, tuple) else v for k, v in options.items()}
        self.nodes.append(self.onnx.helper.make_node(kind, list(inputs), [output], name=output, **options))
        return output

    def _constant(self, name: str, values: NDArray) -> str:
        self.constants[name] = self.onnx.numpy_helper.from_array(np.asarray(values), name)
        return name

    def _integers(self, name: str, values: NDArray, kind: str) -> str:
        number, values = getattr(self.onnx.TensorProto, kind), np.asarray(values)
        raw = pack(values, 4) if kind == "INT4" else values.astype(f"<{STORED[kind]}").tobytes()
        self.constants[name] = self.onnx.helper.make_tensor(name, number, values.shape, raw, raw=True)
        return name


def takes_pixels(program: IntegerProgram) -> bool:
    """Whether a program's codes of images are the pixels, so that its file takes bytes."""
    return bool(program.about.get("pixels"))


def _of_zeros(op: Conv) -> NDArray[np.int64]:
    """Returns the excess of a convolution's sums when its input counts from 0 and not from each channel's zero."""
    outputs, per = op.weight.shape[:2]
    zero = np.repeat(op.zero.reshape(op.groups, per), outputs // op.groups, axis=0)
    return (op.weight.sum((2, 3)) * zero).sum(1)


def _key(spec: TensorSpec) -> tuple[float, int, int, int]:
    """Returns a key that identifies a grid for a whole tensor."""
    return float(spec.unit.ravel()[0]), int(spec.zero_point.ravel()[0]), spec.low, spec.high


def _kind(grid: TensorSpec | Requantize) -> str | None:
    """Returns the narrowest type that holds a grid's codes, None where 16 bits do not."""
    return next((k for k, (a, b) in KINDS.items() if a <= grid.low and grid.high <= b), None)


def _bits(weight: NDArray[np.int64]) -> int:
    return width(min(int(weight.min()), -1), int(weight.max()))  # runtimes take signed weights


def _pads(op: MaxPool, shape: tuple[int, ...], dilation: tuple[int, int]) -> list[int]:
    """Returns paddings before and behind that give as many windows as the program has (ceil mode included)."""
    behind = []
    for n, size, window, stride, pad, step in zip(op.size, shape[1:], op.window, op.stride, op.padding, dilation):
        behind.append(max((n - 1) * stride + step * (window - 1) + 1 - size - pad, 0))
    return [*op.padding, *behind]


def _broadcast(values: NDArray, dims: int) -> NDArray[np.float32]:
    """Returns one value, or one per channel, in the shape that broadcasts against `[N, C, ...]`."""
    values = np.asarray(values, np.float32).ravel()
    return values.reshape(-1, *(1,) * (dims - 1)) if values.size > 1 else values.reshape(())
