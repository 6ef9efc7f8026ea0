"""The nodes of a program's ONNX file, made operation by operation."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qexp.errors import QexpError
from qexp.integer.arithmetic import FLOAT32, float32_factor, width
from qexp.integer.ends import described, normalized_pixels
from qexp.integer.moves import Concat, Flatten, Pad, Permute, Reshape, Slice, StridedPad
from qexp.integer.op import Op
from qexp.integer.products import Divide, Resample
from qexp.integer.program import Clamp, IntegerProgram, Lookup, MaxPool, Requantize, TensorSpec
from qexp.integer.statistics import Length, Normalize, Softmax, UnitLength
from qexp.numerics.packing import pack

OPSET = 21  # the first with int4 and 16-bit grids
KINDS = {"UINT8": (0, 255), "INT8": (-128, 127), "UINT16": (0, 65535), "INT16": (-32768, 32767)}
STORED = {"UINT8": "u1", "INT8": "i1", "UINT16": "u2", "INT16": "i2", "INT32": "i4"}
# no code is changed by these, so they may come before a requantization or after it
MOVERS = (Concat, Flatten, MaxPool, Pad, Permute, Reshape, Slice, StridedPad)
IN_FLOAT = (
    "in float, where rounding differs from machine to machine; export=package computes the network in integers (C99)"
)
WITHOUT: dict[type[Op], str] = {
    Normalize: f"runtimes compute norms over an image's values {IN_FLOAT}",
    Divide: f"runtimes compute quotients {IN_FLOAT}",
    Length: f"runtimes compute lengths of vectors {IN_FLOAT}",
    UnitLength: f"runtimes compute lengths of vectors {IN_FLOAT}",
    Softmax: f"runtimes compute softmax {IN_FLOAT}",
}


class Graph:
    """Nodes and constants of one program; `model()` makes them.

    Args:
        program: What to write.
        forms: The nodes of each type of operation: a function `(graph, op) -> name of the result's real value`.
        requantized_table: The nodes of a table whose result is requantized.
        int4: Store weights of up to 4 bits two to a byte; some importers do not read them, and onnxruntime computes such layers in float.

    Attributes:
        number: Number of the operation whose nodes are made.
    """

    def __init__(
        self,
        program: IntegerProgram,
        forms: dict[type[Op], Callable[[Graph, Any], str]],
        requantized_table: Callable[[Graph, Requantize, Lookup, TensorSpec], str],
        int4: bool = False,
    ) -> None:
        import onnx

        self.onnx, self.program, self.forms, self.int4 = onnx, program, forms, int4
        self.requantized_table = requantized_table
        self.number = 0
        self.makers = {op.output: op for op in program.ops}
        self.sums: dict[
            str, tuple[str, NDArray[np.float32]]
        ] = {}  # by real value of sums: the whole numbers and their unit
        self.on: dict[str, tuple[str, str, TensorSpec]] = {}  # by real value of codes: codes, zero point and grid
        self.named: set[str] = set()  # results of the nodes so far
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
        self.real[start.name] = self._pixels(start) if pixels else self.put_on(self._images(start), start, start.name)
        for i, op in enumerate(program.ops):
            self.number = i
            self.real[op.output] = self._op(op)
        values = {start.name: self.real[start.name]}
        values |= {op.output: self.real[op.output] for op in program.ops if isinstance(op, Requantize) and kind_of(op)}
        self.codes = {name: value.removesuffix(".value") + ".codes" for name, value in values.items()}
        self.node("Identity", [self.real[end.name]], "scores")
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
        self.node("Identity", ["pixels"], f"{grid.name}.codes")
        self.bits[grid.name] = 8
        scale = self.constant(f"{grid.name}.scale", np.float32(grid.unit[0]))
        zero = grid.zero_point[0] if grid.zero_point.size == 1 else 0
        point = self.integers(f"{grid.name}.zero", np.int64(zero), "UINT8")
        return self.node("DequantizeLinear", [f"{grid.name}.codes", scale, point], f"{grid.name}.value")

    def _images(self, grid: TensorSpec) -> str:
        """Returns the images, already on the grid where `QuantizeLinear` alone would give other codes: it adds the zero point last.

        The difference is at ties, where an odd zero point makes another neighbour even (pixels with mean = std = 1/2 are all ties), and
        beside them: a number so near to one that float32 holds only the tie once the zero point is added.
        """
        if grid.unit.size > 1 or grid.zero_point.size > 1 or not self._order_matters(grid):
            return "images"
        unit, zero, low, high = (
            self.constant(f"images.{name}", np.float32(v))
            for name, v in (
                ("unit", grid.unit[0]),
                ("zero", grid.zero_point[0]),
                ("low", grid.low),
                ("high", grid.high),
            )
        )
        x = self.node("Add", [self.node("Div", ["images", unit], "images.steps"), zero], "images.place")
        x = self.node("Round", [self.node("Clip", [x, low, high], "images.clipped")], "images.whole")
        return self.node("Mul", [self.node("Sub", [x, zero], "images.apart"), unit], "images.real")

    def _order_matters(self, grid: TensorSpec) -> bool:
        """Whether a pixel has other codes when the zero point is added after rounding; of unknown pixels, whether one could."""
        pixels = normalized_pixels(self.program.about.get("preprocessing"))
        if pixels is None:
            return bool(grid.zero_point[0])
        steps = pixels / np.float32(grid.unit[0])
        after = np.clip(np.rint(steps) + grid.zero_point[0], grid.low, grid.high)
        return not np.array_equal(after, self.program.encode(pixels))

    def _op(self, op: Op) -> str:
        """Returns the real value of an operation's result, after adding its nodes."""
        if isinstance(op, Requantize):
            grid = replace(self.program.tensors[op.output], low=op.low, high=op.high)
            maker = self.makers.get(op.inputs[0])
            if isinstance(maker, Lookup) and grid.unit.size == 1 and grid.zero_point.size == 1:
                return self.put_on(self.requantized_table(self, op, maker, grid), grid, op.output)
            return self.on_grid(op.inputs[0], grid, op.output)
        if isinstance(op, Clamp):
            x = self.real[op.inputs[0]]
            if None not in self.grids(op.output):
                self.unclamped[op.output] = x, op
                return x
            return self.clamped(op, x, op.output)
        if type(op) not in self.forms:
            raise QexpError(
                f"export=onnx: {op.layer}: {WITHOUT.get(type(op), f'the operation {op.kind!r} has no ONNX form')}"
            )
        return self.forms[type(op)](self, op)

    def clamped(self, op: Clamp, x: str, name: str) -> str:
        """Returns a real value between the limits of a clamp."""
        source = self.program.tensors[op.inputs[0]]
        zero, unit = source.zero_point, source.unit
        if np.array_equal(op.low, zero) and op.high.min() >= source.high:
            if x not in self.sums:
                return self.node("Relu", [x], name)
            whole, step = self.sums[x]
            whole = self.node("Relu", [whole], f"{name}.whole")
            x = self.node("Mul", [whole, self.constant(f"{name}.step", step)], name)
            self.sums[x] = whole, step
            return x
        dims = len(source.shape)
        low, high = (
            self.constant(f"{name}.{end}", broadcast((limit - zero) * unit, dims, op.axis))
            for end, limit in (("low", op.low), ("high", op.high))
        )
        return self.node("Min", [self.node("Max", [x, low], f"{name}.least"), high], name)

    def on_grid(self, tensor: str, grid: TensorSpec, name: str) -> str:
        """Returns the real value of a tensor on a grid of one scale; a clamp before it moves behind it, unless the grid's ends do the same.

        Rounding is monotonic, so both give the same codes, and runtimes fuse a layer with the quantize node right behind it.
        """
        maker = self.makers.get(tensor)
        if isinstance(maker, Lookup) and kind_of(grid) in ("UINT8", "INT8"):
            return self.put_on(
                self.requantized_table(self, _requantized(maker, self.program, grid, name), maker, grid), grid, name
            )
        if tensor not in self.unclamped:
            return self.put_on(self.real[tensor], grid, name)
        x, clamp = self.unclamped[tensor]
        if self._ends_within(grid, clamp):
            return self.put_on(x, grid, name)
        key = tensor, *key_of(grid)
        if key not in self.quantized:
            free = self.put_on(x, grid, f"{name}.free")
            self.quantized[key] = self.put_on(self.clamped(clamp, free, f"{name}.clamped"), grid, name)
        return self.quantized[key]

    def _ends_within(self, grid: TensorSpec, clamp: Clamp) -> bool:
        """Whether a grid lies within a clamp's limits."""
        source = self.program.tensors[clamp.inputs[0]]
        low, high = ((end - grid.zero_point) * grid.unit for end in (grid.low, grid.high))
        least, most = ((end - source.zero_point) * source.unit for end in (clamp.low, clamp.high))
        return low.min() >= least.max() and (high.max() <= most.min() or clamp.high.min() >= source.high)

    def moved(self, op: Op, move: Callable[[list[str]], str]) -> str:
        """Returns the result of an operation that only moves codes, on 8-bit codes if this is exact.

        Runtimes fuse a layer with the quantize node behind it. So that node is placed before the moving operation and again behind it.

        Args:
            op: The operation.
            move: Adds its nodes, for the real values of its inputs, and returns that of its result.
        """
        ahead, name = self.ahead(op), op.output
        xs = [self.real[tensor] for tensor in op.inputs]
        if ahead is not None:
            names = [f"{name}.ahead{k}" if k else f"{name}.ahead" for k in range(len(xs))]
            xs = [self.on_grid(tensor, ahead, ahead_of) for tensor, ahead_of in zip(op.inputs, names)]
        return self.kept(move(xs), ahead or self.program.tensors[name], name)

    def kept(self, x: str, grid: TensorSpec, name: str) -> str:
        """Returns moved codes of a grid with a pair of nodes behind, so that runtimes move 8-bit codes."""
        if grid.unit.size > 1 or grid.zero_point.size > 1 or kind_of(grid) not in ("UINT8", "INT8"):
            return x
        low, high = KINDS[kind_of(grid)]  # the grid uses all codes of its type: no clip is needed
        y = self.put_on(x, replace(grid, low=low, high=high), f"{name}.kept")
        self.quantized[y, *key_of(grid)] = y
        return y

    def shared_grid(self, name: str) -> TensorSpec | None:
        """Returns the grid of all readers of a tensor; None if they share none."""
        grids = self.grids(name)
        return grids[0] if None not in grids and len({key_of(g) for g in grids}) == 1 else None

    def weights(self, name: str, whole: NDArray[np.int64], kind: str, step: NDArray[np.float32]) -> str:
        """Returns the real value of integer weights or biases; with zero points, without which runtimes do not fuse linear layers."""
        scale = self.constant(f"{name}.scale", step)
        zero = self.integers(f"{name}.zero", np.zeros(len(step), np.int64), kind)
        return self.node("DequantizeLinear", [self.integers(name, whole, kind), scale, zero], f"{name}.real", axis=0)

    def readers(self, name: str) -> list[Op]:
        """Returns the operations that read a tensor."""
        return [op for op in self.program.ops if name in op.inputs]

    def sources(self, op: Op) -> list[TensorSpec]:
        """Returns the inputs of an operation."""
        return [self.program.tensors[name] for name in op.inputs]

    def grids(self, name: str) -> list[TensorSpec | None]:
        """Returns the grids of a tensor's readers, looking through operations that only move codes; None for a reader without one."""
        found: list[TensorSpec | None] = [None] if name == self.program.output else []
        for reader in self.readers(name):
            grid = self.program.tensors[reader.output]
            if isinstance(reader, Requantize):
                fits = grid.unit.size == 1 and grid.zero_point.size == 1 and kind_of(grid) is not None
                found.append(replace(grid, low=reader.low, high=reader.high) if fits else None)
            elif moves(reader):
                found.append(self.ahead(reader))
            else:
                found.append(None)
        return found

    def ahead(self, op: Op) -> TensorSpec | None:
        """Returns the grid that all readers of a mover's result share, so that codes can be moved; None if they share none."""
        return self.shared_grid(op.output)

    def put_on(self, x: str, spec: TensorSpec, name: str) -> str:
        """Returns the real value of `x` after it is put on a grid; as it is, where the grid has more than 16 bits."""
        if spec.unit.size > 1 or spec.zero_point.size > 1:
            raise QexpError(
                f"export=onnx: {name}: a scale for each channel of activations has no QDQ form that runtimes take"
            )
        unit, zero = float(spec.unit.ravel()[0]), int(spec.zero_point.ravel()[0])
        kind = kind_of(spec)
        if kind is None:
            return x
        key = x, *key_of(spec)
        if key in self.quantized:
            return self.quantized[key]
        if (spec.low, spec.high) == KINDS[kind] and (x in self.sums or self._on_another_grid(x, spec)):
            self.quantized[key] = self._rescaled(*self._whole(x), spec, name)
            return self.quantized[key]
        self.bits[name] = width(spec.low, spec.high)
        low, high = KINDS[kind]
        if (low, high) != (
            spec.low,
            spec.high,
        ):  # on all codes of the type first, so that runtimes fuse; the ends then come off
            x = self.put_on(x, replace(spec, low=low, high=high), f"{name}.all")
            ends = [
                self.constant(f"{name}.{k}", np.float32((v - zero) * unit))
                for k, v in (("low", spec.low), ("high", spec.high))
            ]
            x = self.node("Clip", [x, *ends], f"{name}.clipped")
        scale = self.constant(f"{name}.scale", np.float32(unit))
        point = self.integers(f"{name}.zero", np.int64(min(max(zero, KINDS[kind][0]), KINDS[kind][1])), kind)
        if not KINDS[kind][0] <= zero <= KINDS[kind][1]:
            raise QexpError(f"export=onnx: {name}: its zero point {zero} lies outside {kind.lower()}")
        codes = self.node("QuantizeLinear", [x, scale, point], f"{name}.codes")
        self.quantized[key] = self._read_as(codes, scale, point, spec, name)
        return self.quantized[key]

    def _read_as(self, codes: str, scale: str, point: str, spec: TensorSpec, name: str) -> str:
        """Returns the real value of codes."""
        value = self.node("DequantizeLinear", [codes, scale, point], f"{name}.value")
        self.on[value] = codes, point, spec
        return value

    def _on_another_grid(self, x: str, spec: TensorSpec) -> bool:
        """Whether `x` are codes of another scale or zero point."""
        return x in self.on and key_of(self.on[x][2])[:2] != key_of(spec)[:2]

    def _whole(self, x: str) -> tuple[str, NDArray[np.float32]]:
        """Returns sums, or codes of a grid, as whole numbers, and their unit.

        (onnxruntime makes one pair of nodes of two in a row, on a third grid, so that codes between two grids are rescaled explicitly.)
        """
        if x not in self.sums:
            codes, point, spec = self.on[x]
            one = self.constant(f"{x}.one", np.float32(1))
            whole = self.node("DequantizeLinear", [codes, one, point], f"{x}.whole")
            self.sums[x] = whole, np.float32(spec.unit[0])
        return self.sums[x]

    def _rescaled(self, whole: str, unit: NDArray[np.float32], spec: TensorSpec, name: str) -> str:
        """Returns the real value of whole numbers of a unit on a grid: times one float32 number each, rounded once."""
        self.bits[name] = width(spec.low, spec.high)
        ratio = self.constant(f"{name}.ratio", unit / np.float32(spec.unit[0]))
        one, scale = (self.constant(f"{name}.{k}", np.float32(v)) for k, v in (("one", 1), ("scale", spec.unit[0])))
        point = self.integers(f"{name}.zero", spec.zero_point[0], kind_of(spec))
        steps = self.node("Mul", [whole, ratio], f"{name}.steps")
        codes = self.node("QuantizeLinear", [steps, one, point], f"{name}.codes")
        return self._read_as(codes, scale, point, spec, name)

    def node(self, kind: str, inputs: Sequence[str], output: str, **options: Any) -> str:
        options = {k: list(v) if isinstance(v, tuple) else v for k, v in options.items()}
        self.nodes.append(self.onnx.helper.make_node(kind, list(inputs), [output], name=output, **options))
        self.named.add(output)
        return output

    def constant(self, name: str, values: NDArray) -> str:
        self.constants[name] = self.onnx.numpy_helper.from_array(np.asarray(values), name)
        return name

    def integers(self, name: str, values: NDArray, kind: str) -> str:
        number, values = getattr(self.onnx.TensorProto, kind), np.asarray(values)
        raw = pack(values, 4) if kind == "INT4" else values.astype(f"<{STORED[kind]}").tobytes()
        self.constants[name] = self.onnx.helper.make_tensor(name, number, values.shape, raw, raw=True)
        return name


def _requantized(maker: Op, program: IntegerProgram, grid: TensorSpec, name: str) -> Requantize:
    """Returns the requantization of an operation's result by runtimes, for a grid that several tensors move to."""
    source = program.tensors[maker.output]
    factor, shift = float32_factor(np.float32(source.unit) / np.float32(grid.unit))
    ends = {"low": grid.low, "high": grid.high, "rounding": FLOAT32, "zero": source.zero_point}
    place = {"layer": maker.layer, "inputs": (maker.output,), "output": name}
    return Requantize(**place, multiplier=factor, shift=shift, addend=grid.zero_point << shift, **ends)


def moves(op: Op) -> bool:
    """Whether an operation changes no code."""
    return isinstance(op, MOVERS) or (isinstance(op, Resample) and op.copies)


def takes_pixels(program: IntegerProgram) -> bool:
    """Whether a program's codes of images are the pixels, so that its file takes bytes."""
    return bool(program.about.get("pixels"))


def key_of(spec: TensorSpec) -> tuple[float, int, int, int]:
    """Returns a key that identifies a grid for a whole tensor."""
    return float(spec.unit.ravel()[0]), int(spec.zero_point.ravel()[0]), spec.low, spec.high


def kind_of(grid: TensorSpec | Requantize) -> str | None:
    """Returns the narrowest type that holds a grid's codes, None where 16 bits do not."""
    return next((k for k, (a, b) in KINDS.items() if a <= grid.low and grid.high <= b), None)


def broadcast(values: NDArray, dims: int, axis: int = 0) -> NDArray[np.float32]:
    """Returns one value, or one per channel along `axis`, in the shape that broadcasts against a tensor of `dims` dimensions."""
    values = np.asarray(values, np.float32).ravel()
    return values.reshape([-1 if k == axis else 1 for k in range(dims)]) if values.size > 1 else values.reshape(())
