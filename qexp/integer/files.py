"""A program on disk: `program.json` describes it, `constants.safetensors` holds its arrays; nothing is unpickled.

`program.json` has `format`, `version`, `checksum` (of all but itself), the tensors in order of their making, the operations in order of
execution; an array is a reference `{"array": key, "dtype", "shape", "sha256"}`. Arrays are stored in the narrowest of int8, int16,
int32, int64 that holds them, little endian, C order.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from qexp.errors import QexpError
from qexp.integer.program import OPS, VERSION, IntegerProgram, Op, TensorSpec
from qexp.integer.schema import Either, Exactly, Whole, check, read_json

FORMAT = "qexp integer program"
PROGRAM, CONSTANTS = "program.json", "constants.safetensors"
_DTYPES = (np.int8, np.int16, np.int32, np.int64)


def save(program: IntegerProgram, folder: Path) -> None:
    """Writes a program's two files into a folder and makes the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    document, arrays = to_json(program)
    save_file(arrays, folder / CONSTANTS)
    (folder / PROGRAM).write_text(json.dumps(document, indent=1))


def load(folder: Path) -> IntegerProgram:
    """Returns the program a folder holds.

    Raises:
        QexpError: A file is missing, cut short, of another version, or was changed; the message names the difference.
    """
    for name in (PROGRAM, CONSTANTS):
        if not (folder / name).is_file():
            raise QexpError(f"{folder / name}: not found; a program is {PROGRAM} and {CONSTANTS} in one folder")
    try:
        document = read_json(folder / PROGRAM)
        arrays = load_file(folder / CONSTANTS)
    except (QexpError, OSError, ValueError, SafetensorError) as error:
        raise QexpError(
            f"{folder}: {PROGRAM} or {CONSTANTS} is cut short or damaged ({error}); write it again"
        ) from None
    return from_json(document, arrays, str(folder))


def to_json(program: IntegerProgram) -> tuple[dict[str, Any], dict[str, NDArray]]:
    """Returns a program as JSON and its arrays by key."""
    arrays: dict[str, NDArray] = {}

    def plain(value: Any, key: str) -> Any:
        if isinstance(value, np.ndarray):
            arrays[key] = narrowest(value)
            return {
                "array": key,
                "dtype": str(arrays[key].dtype),
                "shape": list(value.shape),
                "sha256": _array_hash(arrays[key]),
            }
        return list(value) if isinstance(value, tuple) else value

    document = {
        "format": FORMAT,
        "version": VERSION,
        "about": program.about,
        "input": program.input,
        "output": program.output,
        "rounding": program.rounding,
        "tensors": [
            {
                "name": t.name,
                "shape": list(t.shape),
                "bits": t.bits,
                "low": t.low,
                "high": t.high,
                "unit": t.unit.tolist(),
                "zero_point": t.zero_point.tolist(),
                "axis": t.axis,
            }
            for t in program.tensors.values()
        ],
        "ops": [
            {"op": op.kind} | {f.name: plain(getattr(op, f.name), f"{i}.{f.name}") for f in fields(op)}
            for i, op in enumerate(program.ops)
        ],
    }
    return document | {"checksum": checksum(document)}, arrays


def from_json(document: dict[str, Any], arrays: dict[str, NDArray], where: str = "program") -> IntegerProgram:
    """Returns the program that JSON and arrays describe, after checking every sum."""
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        raise QexpError(f"{where}: not a {FORMAT}")
    if document.get("version") != VERSION:
        raise QexpError(
            f"{where}: version {document.get('version')!r}; this qexp reads version {VERSION}: write the program again"
        )
    said = document.get("checksum")
    if said != checksum({k: v for k, v in document.items() if k != "checksum"}):
        raise QexpError(f"{where}: {PROGRAM} was changed after it was written (checksum); write the program again")
    check(document, _DOCUMENT, f"{where}: {PROGRAM}")
    tensors = {
        t["name"]: TensorSpec(
            t["name"],
            tuple(t["shape"]),
            t["low"],
            t["high"],
            np.array(t["unit"], np.float64),
            np.array(t["zero_point"], np.int64),
            t["axis"],
        )
        for t in document["tensors"]
    }
    ops = [_op(entry, arrays, where) for entry in document["ops"]]
    for name in (document["input"], document["output"]):
        if name not in tensors:
            raise QexpError(f"{where}: {PROGRAM} names no tensor {name!r}, which its input or output is")
    known = {document["input"]}
    for op in ops:
        missing = [name for name in (*op.inputs, op.output) if name not in tensors] or [
            n for n in op.inputs if n not in known
        ]
        if missing:
            raise QexpError(f"{where}: {op.layer} ({op.kind}) reads {missing[0]!r}, which nothing has made")
        known.add(op.output)
    return IntegerProgram(tensors, ops, document["input"], document["output"], document["rounding"], document["about"])


def _op(entry: dict[str, Any], arrays: dict[str, NDArray], where: str) -> Op:
    kind = OPS.get(entry.get("op", ""))
    if kind is None:
        raise QexpError(f"{where}: operation {entry.get('op')!r} is unknown; known are {', '.join(OPS)}")
    check(entry, {f.name: _FIELDS[f.type] for f in fields(kind)}, f"{where}: {entry.get('layer')} ({kind.kind})")
    values = {}
    for f in fields(kind):
        value = entry[f.name]
        if f.type == "Ints":
            array = arrays.get(value["array"])
            if array is None or list(array.shape) != value["shape"] or _array_hash(array) != value["sha256"]:
                raise QexpError(
                    f"{where}: the {f.name} of {entry['layer']} ({entry['op']}) is missing from {CONSTANTS} or not the one the "
                    "program was written with"
                )
            value = array.astype(np.int64)
        values[f.name] = tuple(value) if isinstance(value, list) else value
    return kind(**values)


_ARRAY = {"array": str, "dtype": str, "shape": [Whole()], "sha256": str}
_TENSOR = {
    **{"name": str, "shape": [Whole(1)], "low": Whole(-(2**63), 2**63 - 1), "high": Whole(-(2**63), 2**63 - 1)},
    **{"unit": Either((float, [float])), "zero_point": Either((Whole(-(2**62), 2**62), [Whole(-(2**62), 2**62)]))},
    "axis": Whole(0, 15),
}
_DOCUMENT = {
    **{"input": str, "output": str, "rounding": str, "about": {}},
    **{"tensors": [_TENSOR], "ops": [{"op": str, "layer": str}]},
}
_FIELDS = {  # schema of an operation's field, by its annotation
    **{"str": str, "int": Whole(-(2**63), 2**63 - 1), "Ints": _ARRAY, "dict[str, Any]": {}},
    **{"tuple[str, ...]": [str], "tuple[int, int]": Exactly(2, Whole()), "tuple[int, ...]": [Whole()]},
}


def narrowest(values: NDArray) -> NDArray:
    """Returns integers in the narrowest type that holds them."""
    low, high = (int(values.min()), int(values.max())) if values.size else (0, 0)
    dtype = next(d for d in _DTYPES if np.iinfo(d).min <= low and high <= np.iinfo(d).max)
    return np.ascontiguousarray(values, dtype=dtype)


def checksum(document: dict[str, Any]) -> str:
    """Returns the SHA-256 of a document with sorted keys; the document holds the checksums of its arrays."""
    return hashlib.sha256(json.dumps(document, sort_keys=True, default=str).encode()).hexdigest()


def _array_hash(array: NDArray) -> str:
    return hashlib.sha256(
        np.ascontiguousarray(array).astype(array.dtype.newbyteorder("<"), copy=False).tobytes()
    ).hexdigest()
