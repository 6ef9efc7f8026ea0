"""Finds a quantizer's integers by probing it: the grid of an activation, the integer weights and their unit."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from qexp.errors import QexpError
from qexp.integer.arithmetic import ROUNDINGS, round_reals
from qexp.integer.bounds import ROOM
from qexp.quantizers.base import Quantizer

Ints = NDArray[np.int64]
Reals = NDArray[np.float64]
_PROBES = 33  # number of codes of a wide grid that are probed
_NEAR = 1e-3  # distance of the probes from a decision, in steps
_MOST = 2**15  # greatest integer weight of a set of levels
# And the least of the greatest: levels without a common step are rounded to a finer one than that of 12 bits.
_LEAST = 2**11
_SUM = 2**31  # sums of such levels stay below it, where that costs no more than the above


@dataclass(frozen=True)
class Grid:
    """Evenly spaced codes: `clip(round(x / scale + zero), low, high)`; scale and zero are one number or one per channel."""

    scale: Reals
    zero: Ints
    low: int
    high: int
    rounding: str

    @property
    def power_of_two(self) -> bool:
        """Whether all steps are powers of two."""
        return is_power_of_two(self.scale)


def is_power_of_two(values: Reals) -> bool:
    """Whether all of some positive numbers are powers of two."""
    return bool((np.frexp(values)[0] == 0.5).all())


class CannotLowerError(QexpError):
    """A part of a network has no integer form.

    Attributes:
        where, reason, remedy: The layer, why, and what to do.
        mends: A layer whose result would need one scale for all channels for this part to have a form; None if that is no way.
    """

    def __init__(self, where: str, reason: str, remedy: str, mends: str | None = None) -> None:
        super().__init__(f"{where}: cannot be lowered to integers: {reason}; {remedy}")
        self.where, self.reason, self.remedy, self.mends = where, reason, remedy, mends


def cannot(where: str, reason: str, remedy: str) -> CannotLowerError:
    """Returns the error for a part without an integer form: where, why, what to do."""
    return CannotLowerError(where, reason, remedy)


def together(refusals: list[CannotLowerError]) -> QexpError:
    """Returns one error for all parts without an integer form; parts with one reason, but for its numbers, are named together."""
    alike: dict[str, list[CannotLowerError]] = {}
    for refusal in refusals:
        alike.setdefault(re.sub(r"\d+", "", refusal.reason), []).append(refusal)
    lines: list[str] = []
    remedies = [parts[0].remedy for parts in alike.values()]
    for number, (first, *others) in enumerate(alike.values()):
        line = f"{first.where}: cannot be lowered to integers: {first.reason}"
        line += (
            "" if first.remedy in remedies[number + 1 :] else f"; {first.remedy}"
        )  # a remedy of several reasons comes last
        names = ", ".join(dict.fromkeys(other.where for other in others[:4]))
        more = f" and {len(others) - 4} more" if len(others) > 4 else ""
        lines.append(line + (f" (so for {names}{more})" if others else ""))
    return QexpError("\n".join(lines))


@torch.no_grad()
def activation_grid(quantizer: Quantizer, where: str) -> Grid:
    """Returns the grid of an activation's quantizer, after checking that it rounds like this grid.

    Raises:
        QexpError: The quantizer differs: uneven levels, a zero between two codes, ranges from each batch, or noise.
    """
    affine = "give this tensor an even grid with a rule (_target_: qexp.quantizers.uniform.Uniform)"
    kind = type(quantizer).__name__
    quantizer.require_ready()
    if quantizer.gain is not None or quantizer.dynamic:
        raise cannot(where, f"{kind} takes its range from each batch, or corrects its values", "use ranges: static")
    if quantizer.rounding not in ROUNDINGS or quantizer.noise != "none":
        raise cannot(where, f"{kind} adds noise or rounds stochastically", "use rounding: half_even and noise: none")
    if quantizer.granularity.axis not in (None, 1):
        raise cannot(where, f"{kind} has groups of scales ({quantizer.granularity})", "use granularity: tensor")
    scale, zero = (_flat(torch.as_tensor(v)) for v in (quantizer.scale, quantizer.zero_point))
    limits = [_flat(torch.as_tensor(v)) for v in quantizer.limits]
    if not np.array_equal(zero, np.rint(zero)):
        raise cannot(where, f"{kind} has no code for zero at {quantizer.bits} bits", affine)
    low, high = (np.broadcast_to(v, scale.shape if v.size > 1 else (1,)) for v in limits)
    if low.size > 1 and (len(set(low)) > 1 or len(set(high)) > 1):
        raise cannot(where, "its channels have different widths", "give the tensor one width")
    grid = Grid(scale, _narrow(zero).astype(np.int64), int(low[0]), int(high[0]), quantizer.rounding)
    grid = Grid(_narrow(grid.scale), grid.zero, grid.low, grid.high, grid.rounding)
    if not _rounds_evenly(quantizer, grid):
        raise cannot(where, f"the levels of {kind} are not evenly spaced, or it scales the tensor", affine)
    return grid


def _rounds_evenly(quantizer: Quantizer, grid: Grid) -> bool:
    """Compares codes, values and decisions of a quantizer with those of a grid."""
    count = min(_PROBES, grid.high - grid.low + 1)
    codes = np.unique(np.linspace(grid.low, grid.high, count).round())[:, None]
    scale, zero = grid.scale[None], grid.zero[None]
    channels = max(scale.size, zero.size, 1 if quantizer.granularity.axis is None else _channels(quantizer))

    def ask(codes: Reals) -> Tensor:  # [probes, channels, 1, ...] as the quantizer's tensor has dimensions
        x = np.broadcast_to((codes - zero) * scale, (len(codes), channels))
        return torch.from_numpy(x.astype(np.float32)).reshape(len(codes), channels, *[1] * (len(quantizer.shape) - 2))

    def same(offset: float) -> bool:
        expected = np.clip(round_reals(codes + offset, grid.rounding), grid.low, grid.high)
        got = quantizer.codes(ask(codes + offset)).double().numpy().reshape(len(codes), -1)
        return bool((got == expected).all())

    span = abs(grid.high) + abs(grid.low) + float(np.abs(grid.zero).max())
    near = max(_NEAR, 4 * span * 2.0**-23)
    if near >= 0.25 or not all(same(offset) for offset in (-near, near, 0.5 - near, 0.5 + near)):
        return False
    values = quantizer.dequantize(torch.from_numpy(np.repeat(codes, channels, 1)).float().reshape(ask(codes).shape))
    expected = np.broadcast_to((codes - zero) * scale, (len(codes), channels))
    apart = max(1e-4, span * 2.0**-23)  # float32 is no more exact at the outermost of 2^16 levels
    return bool((np.abs(values.double().numpy().reshape(len(codes), -1) - expected) <= apart * scale).all())


def _channels(quantizer: Quantizer) -> int:
    return quantizer.shape[quantizer.granularity.axis]


def _flat(values: Tensor) -> Reals:
    return values.detach().cpu().double().flatten().numpy()


def _narrow(values: NDArray) -> NDArray:
    """Returns one number if all are equal."""
    return values[:1] if (values == values[0]).all() else values


@torch.no_grad()
def integer_weight(
    weight: Tensor,
    quantizer: Quantizer,
    where: str,
    reach: int,
    arrange: Callable[[Tensor], Tensor] | None = None,
) -> tuple[Ints, Reals]:
    """Returns integer weights `[O, ...]` and the real value of one, `[O]`: `w^ = integers * unit`.

    For evenly spaced codes, the integers are the codes minus their zero point. Otherwise they are the levels as multiples of a step:
    powers of two in units of the least one, signs of a binary method, additive powers. Levels that are not multiples of one step
    (k-means, logarithms, corrected weights) are rounded to integers of up to 16 bits: `integers * unit` is within half a unit of the
    level.

    Args:
        weight: The float weight `[O, I, ...]`.
        quantizer: Its quantizer.
        where: Layer and site, for the error.
        reach: Greatest magnitude of an input's integer, which bounds the sums.
        arrange: Function that brings a weight's values into the form `[O, ...]`, where they have another.

    Raises:
        QexpError: There are more levels than the bits allow: the quantizer does not keep its weights on a grid.
    """
    if quantizer.gain is None:
        found = _of_codes(weight, quantizer, arrange)
        if found is not None:
            return found
    values = (arrange or _unchanged)(quantizer(weight).detach().cpu().double()).numpy()
    outputs = len(values)
    if quantizer.granularity.axis is not None or quantizer.gain is not None:
        parts = [_multiples(row[None], where, quantizer, reach) for row in values]
        return np.concatenate([p[0] for p in parts]), np.array([p[1] for p in parts])
    whole, step = _multiples(values, where, quantizer, reach)
    return whole, np.full(outputs, step)


def _of_codes(
    weight: Tensor, quantizer: Quantizer, arrange: Callable[[Tensor], Tensor] | None
) -> tuple[Ints, Reals] | None:
    """Returns codes minus their zero points as integers, and one scale per output; None where they are not the weight's values.

    It goes through the outputs in parts: large linear layers fill the memory several times otherwise.
    """
    values, codes = (t.detach().cpu() for t in (quantizer(weight), quantizer.codes(weight)))
    values, codes = (arrange or _unchanged)(values), (arrange or _unchanged)(codes)
    scales, zeros = (_by_output(weight, quantizer, v, arrange) for v in (quantizer.scale, quantizer.zero_point))
    outputs, found = len(values), np.empty(values.shape, np.int64)
    # a binary method's zero lies half-way between its codes
    twice = 2 if bool((zeros.double() != zeros.double().round()).any()) else 1
    rows = max(1, ROOM // max(values[:1].numel(), 1))
    for first in range(0, outputs, rows):
        scale, zero, code, value = (
            t[first : first + rows].double().flatten(1).numpy() for t in (scales, zeros, codes, values)
        )  # the values are rounded to float32, like all results of the network
        exact = np.abs((code - zero) * scale - value) <= np.maximum(1e-4 * scale, np.abs(value) * 2.0**-21)
        whole = twice * (code - zero)
        if not exact.all() or not (scale == scale[:, :1]).all() or not np.array_equal(whole, np.rint(whole)):
            return None
        found[first : first + rows] = whole.reshape(-1, *values.shape[1:])
    return found, scales.double().flatten(1).numpy()[:, 0] / twice


def _unchanged(values: Tensor) -> Tensor:
    return values


def _by_output(weight: Tensor, quantizer: Quantizer, value: Any, arrange: Callable | None) -> Tensor:
    """Returns a quantizer's scales or zero points, `[O, 1]` where each output has one, else one per weight."""
    rows, value = quantizer.rows(weight)[0], torch.as_tensor(value).detach().to(weight)
    aligned = arrange is None and quantizer.granularity.axis in (None, 0) and len(rows) in (1, len(weight))
    if aligned and value.numel() in (1, len(weight)):
        return value.reshape(-1, 1).expand(len(weight), 1).cpu()
    whole = (quantizer.rows(weight.new_ones(weight.shape))[0] * value).reshape(weight.shape).cpu()
    return (arrange or _unchanged)(whole)


def _multiples(values: Reals, where: str, quantizer: Quantizer, reach: int) -> tuple[Ints, float]:
    """Returns values `[O, ...]` as integer multiples of the greatest common step, or else of a sufficiently fine step."""
    magnitudes = np.unique(np.abs(values))
    magnitudes = magnitudes[magnitudes > 0]
    if not len(magnitudes):
        return np.zeros(values.shape, np.int64), 1.0
    gaps = np.diff(np.concatenate([[0.0], magnitudes]))
    for step in (magnitudes[0], gaps[gaps > 1e-4 * magnitudes[0]].min()):
        whole = np.rint(magnitudes / step)
        step = float((magnitudes * whole).sum() / (whole * whole).sum()) if not is_power_of_two(magnitudes) else step
        if whole.max() <= _MOST and np.abs(magnitudes - whole * step).max() <= 1e-4 * step:
            return np.rint(values / step).astype(np.int64), float(step)
    if len(np.unique(values)) > 2**quantizer.bits:
        raise cannot(
            where,
            f"{type(quantizer).__name__} produced {len(np.unique(values))} distinct weight values, more than {quantizer.bits} bits allow",
            "use a method that keeps all weights on its grid",
        )
    flat = np.abs(values.reshape(len(values), -1)) / magnitudes[-1]
    room = (_SUM / max(reach, 1) - flat.shape[1] / 2) / flat.sum(1).max()
    step = float(magnitudes[-1] / np.clip(np.floor(room), _LEAST, _MOST - 1))
    return np.rint(values / step).astype(np.int64), step
