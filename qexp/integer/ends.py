"""The two ends of a program: the conversion of pixels to codes, and the meaning of the codes of scores."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from qexp.integer.program import IntegerProgram, TensorSpec

ENCODE = (
    "codes = clip(round((pixel / max_value - mean) / std / scale + zero_point), low, high), ties to even, in float32"
)
DECODE = "score = (code - zero_point) * scale; the greatest code is the prediction"


def preprocessing(data: Any) -> dict[str, Any] | None:
    """Returns a data set's preprocessing (size, channel order, greatest pixel value, mean, std); None if unknown."""
    normalize = getattr(data, "normalize", None)
    if normalize is None:
        return None
    return {
        "channel_order": normalize.channel_order,
        "max_value": normalize.max_value,
        "mean": list(normalize.mean),
        "std": list(normalize.std),
    }


def normalized_pixels(how: dict[str, Any] | None) -> NDArray[np.float32] | None:
    """Returns the network's input for each pixel value, `[256, C, 1, 1]`, in float32 as images are prepared; None if unknown."""
    if not how:
        return None
    mean, std = (np.array(how[key], np.float32).reshape(1, -1, 1, 1) for key in ("mean", "std"))
    pixels = np.arange(256, dtype=np.float32).reshape(-1, 1, 1, 1)
    return (pixels / np.float32(how["max_value"]) - mean) / std


def pixel_codes(program: IntegerProgram) -> NDArray[np.int64] | None:
    """Returns the code of each pixel value, `[C, 256]`; None if the preparation of pixels is not known."""
    pixels = normalized_pixels(program.about.get("preprocessing"))
    if pixels is None or pixels.shape[1] != program.tensors[program.input].shape[0]:
        return None
    return program.encode(pixels)[:, :, 0, 0].T


def described(program: IntegerProgram) -> dict[str, dict[str, Any]]:
    """Returns the description of a program's inputs and outputs for JSON."""
    start, end = program.tensors[program.input], program.tensors[program.output]
    how = program.about.get("preprocessing")
    return {
        "input": _grid(start) | {"rounding": program.rounding, "preprocessing": how, "encode": ENCODE},
        "output": _grid(end) | {"decode": DECODE},
    }


def _grid(spec: TensorSpec) -> dict[str, Any]:
    unit, zero = spec.unit.tolist(), spec.zero_point.tolist()
    return {
        "shape": list(spec.shape),
        "scale": unit[0] if len(unit) == 1 else unit,
        "zero_point": zero[0] if len(zero) == 1 else zero,
        "low": spec.low,
        "high": spec.high,
    }
