"""A program as an ONNX file: quantize and dequantize nodes (QDQ) around ordinary operators, as runtimes fuse them.

Every tensor of a program has a real value, so the graph computes with real values, and a `QuantizeLinear` stands wherever the program
requantizes, or ahead of what only moves codes (pools, shortcuts), so that runtimes fuse it with the layer before. Grids of up to 8 bits
lie in int8 or uint8, of up to 16 in int16 or uint16; a grid that does not fill its type is cut by a `Clip` before it, and its width is
written into the model's metadata (`qexp.bits`, a JSON object from tensor to bits), so that a reader for custom widths finds it. Weights
of up to 4 bits are int8 (int4 on demand). Biases are int32, in steps of the sums they are added to, and a program with finer biases is
rejected. With `deploy=int8`, runtimes compute the program to the last code; `compare` counts the codes that differ.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qexp.errors import QexpError
from qexp.integer.arithmetic import RUNTIMES
from qexp.integer.bounds import greatest_pair
from qexp.integer.fast import Fast
from qexp.integer.onnx_graph import Graph, takes_pixels
from qexp.integer.onnx_nodes import FORMS
from qexp.integer.onnx_products import looked_up
from qexp.integer.program import Conv, IntegerProgram, Linear, Requantize

REMEDY = "run the point anew with deploy=int8, which computes as runtimes do, and export that"
PAIR = 2**15 - 1  # two products of bytes, as old x86 processors hold them
HELD = 2**24  # codes in memory at a time
SCORE = 2.0**-20  # relative to the greatest score: the error of float32
INSTALL = (
    "export=onnx needs onnx and onnxruntime, which are not installed: pip install 'qexp[export]' (in a clone: "
    "pip install -e '.[export]')"
)


def check_installed() -> None:
    """Raises if the packages to write or run a file are missing."""
    try:
        import onnx  # noqa: F401 - checks that they are installed
        import onnxruntime  # noqa: F401
    except ImportError:
        raise QexpError(INSTALL) from None


def write(program: IntegerProgram, path: Path, int4: bool = False) -> dict[str, Any]:
    """Writes the program as an ONNX file and returns a summary: `bytes`, `nodes`, and `bits` by tensor.

    Args:
        program: The program to write.
        path: The file.
        int4: Store weights of up to 4 bits two to a byte.

    Raises:
        QexpError: onnx is not installed, or an operation has no QDQ form. The message names layer and reason.
    """
    check_installed()
    import onnx

    refuse(program)
    graph = Graph(program, FORMS, looked_up, int4)
    model = graph.model()
    onnx.checker.check_model(model)
    path.parent.mkdir(parents=True, exist_ok=True)
    onnx.save(model, path)
    return {"bytes": path.stat().st_size, "nodes": len(model.graph.node), "bits": graph.bits}


def session(model: Path | bytes, threads: int = 0) -> Any:
    """Returns an onnxruntime session on the CPU, of a file or a serialized model; 0 threads let onnxruntime choose."""
    check_installed()
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = threads, 3
    given = model if isinstance(model, bytes) else str(model)
    return onnxruntime.InferenceSession(given, options, providers=["CPUExecutionProvider"])


def fed(program: IntegerProgram, images: NDArray[np.float32]) -> dict[str, NDArray]:
    """Returns images `[N, C, H, W]` in the input form of a program's file: unchanged, or as pixels."""
    if takes_pixels(program):
        return {"pixels": program.encode(images).astype(np.uint8)}
    return {"images": np.ascontiguousarray(images)}


@dataclass
class Found:
    """Differences between the results of onnxruntime and of a program.

    Attributes:
        images: Number of images compared.
        codes, differ, most: Codes compared, those that differ, and by how much at most.
        scores: Number of scores that differ from the program's in float32.
        first: The first tensor with a code that differs, in order of execution.
    """

    images: int = 0
    codes: int = 0
    differ: int = 0
    most: int = 0
    scores: int = 0
    first: str = ""

    @property
    def equal(self) -> bool:
        """Whether all are the same."""
        return not self.differ and not self.scores

    def line(self) -> str:
        """Returns the verdict in one line."""
        word = "EQUAL" if self.equal else "DIFFERENT"
        where = f", first at {self.first}" if self.first else ""
        return (
            f"onnxruntime against integers, {self.images} images: {word} ({self.differ} of {self.codes} codes differ, by at most "
            f"{self.most}{where}; {self.scores} scores)"
        )


def comparison(program: IntegerProgram, path: Path) -> Callable[[NDArray[np.float32]], Found]:
    """Returns a function that compares onnxruntime with the program on images `[N, C, H, W]` and accumulates the differences.

    Args:
        program: The program that the file was written from.
        path: The file.
    """
    import onnx

    model = onnx.load(path)
    names = json.loads(next(note.value for note in model.metadata_props if note.key == "qexp.codes"))
    model.graph.output.extend(onnx.helper.make_empty_tensor_value_info(name) for name in dict.fromkeys(names.values()))
    plain, theirs = session(path, 1), session(model.SerializeToString(), 1)
    outputs = [o.name for o in theirs.get_outputs()]
    fast, found = Fast(program, watched=set(names)), Found()
    per = max(1, HELD // sum(int(np.prod(program.tensors[name].shape)) for name in names))

    def some(images: NDArray[np.float32]) -> None:
        feed = fed(program, images)
        made = dict(zip(outputs, theirs.run(None, feed), strict=True))

        def take(name: str, codes: Any) -> None:
            if name in names:
                gap = np.abs(made[names[name]].astype(np.int64) - codes.numpy().astype(np.int64))
                found.codes += gap.size
                found.differ += int((gap > 0).sum())
                found.most = max(found.most, int(gap.max(initial=0)))
                found.first = found.first or (name if gap.any() else "")

        scores = program.decode(fast.run(program.encode(images), take).numpy())
        unit = float(program.tensors[program.output].unit.max())
        for given in (made["scores"], plain.run(None, feed)[0]):
            apart = np.abs(given - scores) > unit / 2 + SCORE * np.abs(scores).max(initial=0)
            found.scores += int(apart.sum())
        found.images += len(images)

    def compare_(images: NDArray[np.float32]) -> Found:
        for start in range(0, len(images), per):
            some(images[start : start + per])
        return found

    return compare_


def compare(program: IntegerProgram, path: Path, images: NDArray[np.float32]) -> Found:
    """Returns how the codes and scores that onnxruntime computes of images `[N, C, H, W]` differ from the program's."""
    return comparison(program, path)(images)


def refuse(program: IntegerProgram) -> None:
    """Raises if a file cannot compute the program: a bias lies between two steps of its sums.

    Raises:
        QexpError: The file cannot compute the program. The message names the layer, the reason and the setting to use instead.
    """
    for op in program.ops:
        if isinstance(op, Conv | Linear) and not op.unit and (op.bias % (1 << op.align)).any():
            raise QexpError(
                f"export=onnx: {op.layer}: its bias lies between two steps of the sums it is added to, and runtimes have whole steps "
                f"of 32 bits; {REMEDY}"
            )


def saturating(program: IntegerProgram) -> list[str]:
    """Returns the layers with different codes on x86 without VNNI, which adds their products in too few bits."""
    layers = [op for op in program.ops if isinstance(op, Conv | Linear) and op.weight.size > len(op.weight)]
    return [op.layer for op in layers if _bytes(op) and greatest_pair(op) > PAIR]


def _bytes(op: Conv | Linear) -> bool:
    """Whether a layer's weights are int8 in a file."""
    return bool(op.weight.min() >= -128 and op.weight.max() <= 127)


def why(program: IntegerProgram, int4: bool = False) -> str:
    """Returns why a file may compute other codes than its program, and the setting to use instead."""
    if int4 and any(
        isinstance(op, Conv | Linear) and op.weight.min() >= -8 and op.weight.max() <= 7 for op in program.ops
    ):
        return "onnxruntime computes layers with int4 weights in float; take export=onnx, which stores them as int8"
    if not any(isinstance(op, Requantize) and op.rounding in RUNTIMES for op in program.ops):
        return REMEDY
    wide = [name for name, grid in program.tensors.items() if name in _read(program) and grid.bits > 8]
    if wide:
        return f"{wide[0]} has more than the 8 bits that runtimes compute with in integers; give it 8 (layer_abit, layer_wbit, or a rule)"
    return "its float32 sums depend on the order of additions here; export=package computes this network in integers"


def _read(program: IntegerProgram) -> set[str]:
    """Returns the tensors that layers read."""
    return {op.inputs[0] for op in program.ops if isinstance(op, Conv | Linear)}
