"""Real values that lie on few levels, held in as many bits as their levels need, and restored to the bit."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qexp.errors import QexpError
from qexp.numerics.packing import pack, unpack

Reals = NDArray[np.float32]
Ints = NDArray[np.int64]
WIDEST = 16  # bits of a code
MOST_LEVELS = 1 << 12  # of a table


@dataclass(frozen=True)
class Packed:
    """Values `[O, ...]` as codes and what they mean, for all values alike or for each row (each output) of its own.

    Value of code `q` in row `r`: `(q + low[r]) * step[r]` in float32, or with a table `levels[r, q]`.

    Attributes:
        shape: Shape of the values.
        bits: Bits of a code.
        codes: The codes, unsigned, lowest bit first.
        low: Integer of code 0, `[1]` or `[O]`; `[0]` with a table.
        step: Real value of one integer, likewise; None with a table.
        levels: The table `[1, L]` or `[O, L]`; None with steps.
    """

    shape: tuple[int, ...]
    bits: int
    codes: NDArray[np.uint8]
    low: NDArray[np.int32]
    step: Reals | None = None
    levels: Reals | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of the codes and of what they mean."""
        return sum(a.nbytes for a in (self.codes, self.low, self.step, self.levels) if a is not None)

    def places(self) -> Ints:
        """Returns the codes `[O, ...]`."""
        return unpack(self.codes.tobytes(), math.prod(self.shape), self.bits, False).reshape(self.shape)

    def integers(self) -> Ints | None:
        """Returns the integers `[O, ...]` whose multiples of the step are the values; None with a table."""
        return None if self.step is None else self.places() + _spread(self.low, self.shape)

    def values(self) -> Reals:
        """Returns the values `[O, ...]`."""
        if self.levels is None:
            return self.integers().astype(np.float32) * _spread(self.step, self.shape)
        places = self.places()
        if places.size and int(places.max()) >= self.levels.shape[1]:
            raise QexpError(f"a code of {int(places.max())} lies beyond its table of {self.levels.shape[1]} levels")
        rows = places.reshape(len(self.levels), -1)
        return np.take_along_axis(self.levels, rows, 1).reshape(self.shape)

    def arrays(self, name: str) -> tuple[dict[str, NDArray], dict[str, Any]]:
        """Returns the arrays to store, by key, and the description of the tensor for JSON."""
        arrays = {"codes": self.codes, "low": self.low, "step": self.step, "levels": self.levels}
        held = {f"{name}#{part}": array for part, array in arrays.items() if array is not None}
        return held, {"shape": list(self.shape), "bits": self.bits}

    @classmethod
    def of(cls, name: str, arrays: Mapping[str, NDArray], about: Mapping[str, Any]) -> Packed:
        """Returns packed values from what `arrays` returned.

        Raises:
            QexpError: An array is missing or has another type, or the description does not fit it.
        """
        shape, bits = tuple(about["shape"]), about["bits"]
        codes, low, step, levels = (arrays.get(f"{name}#{part}") for part in ("codes", "low", "step", "levels"))
        kinds = ((codes, np.uint8), (low, np.int32), (step, np.float32), (levels, np.float32))
        rows = {a.shape[0] for a in (step, levels) if a is not None and a.ndim}
        if (
            codes is None
            or low is None
            or (step is None) == (levels is None)
            or any(a is not None and a.dtype != kind for a, kind in kinds)
            or not 1 <= bits <= WIDEST
            or not rows <= {1, shape[0]}
            or len(codes) != -(-math.prod(shape) * bits // 8)
        ):
            raise QexpError(
                f"{name}: its codes, steps or levels are missing or do not fit {list(shape)} of {bits} bits"
            )
        return cls(shape, bits, codes, low, step, levels)


def packed(values: Reals, step: Reals | None = None) -> Packed | None:
    """Returns values `[O, ...]` in the form that takes the fewest bytes and restores them exactly; None where float is smallest.

    Args:
        values: The values.
        step: The step they are multiples of, one number or one per row, where it is known.

    >>> found = packed(np.array([[0.5, -0.25], [0.25, 0.0]], np.float32), np.array([0.25], np.float32))
    >>> found.bits, found.integers().tolist(), found.values().tolist()
    (2, [[2, -1], [1, 0]], [[0.5, -0.25], [0.25, 0.0]])
    """
    values = np.ascontiguousarray(values, np.float32)
    if not values.size or not np.isfinite(values).all():
        return None
    forms = [_steps(values, step), *(_table(values, rows) for rows in (1, len(values)))]
    known = [form for form in forms if form is not None and np.array_equal(form.values(), values)]
    best = min(known, key=lambda form: form.nbytes, default=None)
    return best if best is not None and best.nbytes < values.nbytes else None


def _steps(values: Reals, step: Reals | None) -> Packed | None:
    """Returns values as integers times a step."""
    if step is None or step.size not in (1, len(values)) or not (step > 0).all():
        return None
    step = np.ascontiguousarray(step.reshape(-1), np.float32)
    whole = np.rint(values.astype(np.float64) / _spread(step, values.shape).astype(np.float64)).reshape(len(step), -1)
    if np.abs(whole).max() >= 2**24:  # no longer exact in float32
        return None
    low = whole.min(1)
    bits = max(int((whole.max(1) - low).max()).bit_length(), 1)
    if bits > WIDEST:
        return None
    codes = (whole - low[:, None]).astype(np.int64)
    return Packed(values.shape, bits, _bytes(codes, bits), low.astype(np.int32), step)


def _table(values: Reals, rows: int) -> Packed | None:
    """Returns values as places in a table of all that occur, one for all or one per row."""
    parts = values.reshape(rows, -1)
    found = [np.unique(part) for part in parts]
    most = max(map(len, found))
    if most > MOST_LEVELS:
        return None
    bits = max((most - 1).bit_length(), 1)
    levels = np.stack([np.pad(row, (0, most - len(row)), mode="edge") for row in found])
    codes = np.stack([np.searchsorted(row, part) for row, part in zip(found, parts)])
    return Packed(values.shape, bits, _bytes(codes, bits), np.zeros(1, np.int32), levels=levels)


def _bytes(codes: Ints, bits: int) -> NDArray[np.uint8]:
    return np.frombuffer(pack(codes, bits), np.uint8)


def _spread(rows: NDArray, shape: tuple[int, ...]) -> NDArray:
    """Returns one number, or one per row, so that it broadcasts against the values."""
    return rows.reshape(-1, *[1] * (len(shape) - 1))
