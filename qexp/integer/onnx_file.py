"""A program as an ONNX file: quantize and dequantize nodes (QDQ) around ordinary operators, as runtimes fuse them.

Every tensor of a program has a real value, so the graph computes with real values, and a `QuantizeLinear` stands wherever the program
requantizes, or ahead of what only moves codes (pools, shortcuts), so that runtimes fuse it with the layer before. Grids of up to 8 bits
lie in int8 or uint8, of up to 16 in int16 or uint16; a grid that does not fill its type is cut by a `Clip` before it, and its width is
written into the model's metadata (`qexp.bits`, a JSON object from tensor to bits), so that a reader for custom widths finds it. Weights
of up to 4 bits are int4. Sums of more than 16 bits stay real: they are not rounded in between, and the scale is a float; biases have no
more than the 32 bits of runtimes. So codes may differ by one from the program's; `compare` counts them.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qexp.errors import QexpError
from qexp.integer.fast import Fast
from qexp.integer.onnx_graph import Graph
from qexp.integer.program import IntegerProgram

INSTALL = (
    "export=onnx needs onnx and onnxruntime, which are not installed: pip install 'qexp[export]' (in a clone: "
    "pip install -e '.[export]')"
)


def check_installed() -> None:
    """Raises where a file could not be written or run."""
    try:
        import onnx  # noqa: F401 - whether they are there
        import onnxruntime  # noqa: F401
    except ImportError:
        raise QexpError(INSTALL) from None


def write(program: IntegerProgram, path: Path) -> dict[str, Any]:
    """Writes the program as an ONNX file and returns what it holds: `bytes`, `nodes`, and `bits` by tensor.

    Raises:
        QexpError: onnx is not installed, or an operation has no QDQ form; layer and reason are named.
    """
    check_installed()
    import onnx

    graph = Graph(program)
    model = graph.model()
    onnx.checker.check_model(model)
    path.parent.mkdir(parents=True, exist_ok=True)
    onnx.save(model, path)
    return {"bytes": path.stat().st_size, "nodes": len(model.graph.node), "bits": graph.bits}


def session(model: Path | bytes, threads: int = 0) -> Any:
    """Returns an onnxruntime session on the CPU, of a file or a serialized model; 0 threads leave the choice to it."""
    check_installed()
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = threads, 3
    given = model if isinstance(model, bytes) else str(model)
    return onnxruntime.InferenceSession(given, options, providers=["CPUExecutionProvider"])


def compare(program: IntegerProgram, path: Path, images: NDArray[np.float32]) -> dict[str, int]:
    """Returns how the codes that onnxruntime computes differ from the program's: `codes` compared, `differ`, `most` (by how much).

    Args:
        program: What the file was written from.
        path: The file.
        images: `[N, C, H, W]`.
    """
    import onnx

    model = onnx.load(path)
    names = json.loads(next(note.value for note in model.metadata_props if note.key == "qexp.codes"))
    model.graph.output.extend(onnx.helper.make_empty_tensor_value_info(name) for name in dict.fromkeys(names.values()))
    theirs = session(model.SerializeToString(), 1)
    made = dict(zip([o.name for o in theirs.get_outputs()], theirs.run(None, {"images": images}), strict=True))
    found = {"codes": 0, "differ": 0, "most": 0}

    def take(name: str, codes: Any) -> None:
        if name in names:
            gap = np.abs(made[names[name]].astype(np.int64) - codes.numpy().astype(np.int64))
            found["codes"] += gap.size
            found["differ"] += int((gap > 0).sum())
            found["most"] = max(found["most"], int(gap.max(initial=0)))

    Fast(program, watched=set(names)).run(program.encode(images), take)
    return found
