"""Selects neighbouring units to reconstruct as one: errors change most where the capacities of neighbours differ."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from qexp.errors import QexpError
from qexp.passes.reconstruction.units import Unit, watch

log = logging.getLogger(__name__)
_STRIDED = 1.6  # how much more a convolution with stride 2 counts


def capacity(model: nn.Module, unit: Unit) -> float:
    """Returns the sum over a unit's layers of weights times bits, times 1.6 where the stride is above 1."""
    total = 0.0
    for name in unit.layers:
        layer = model.get_submodule(name)
        stride = max(layer.stride) if isinstance(getattr(layer, "stride", None), tuple) else 1
        total += layer.weight.numel() * layer.weight_quantizer.bits * (_STRIDED if stride > 1 else 1.0)
    return total


def largest_steps(capacities: Sequence[float], k: int, possible: Sequence[bool] | None = None) -> list[int]:
    """Returns the k places i, in order, where `|capacities[i + 1] - capacities[i]|` is largest among those that are possible.

    >>> largest_steps([2, 2.2, 5, 4.8, 4.9, 9], 2)
    [1, 4]
    """
    steps = [abs(b - a) for a, b in itertools.pairwise(capacities)]
    places = [i for i in range(len(steps)) if possible is None or possible[i]]
    return sorted(sorted(places, key=lambda i: -steps[i])[:k])


def joined_units(model: nn.Module, units: Sequence[Unit], k: int, example: Tensor) -> list[Unit]:
    """Returns the units with the k pairs of neighbours joined whose capacities differ most; pairs that overlap become one unit.

    Two units can be joined where the first one's result is the second one's input.

    Args:
        model: Network with its quantizers attached and fitted.
        units: In order of execution.
        k: How many pairs; more than there are joins all that can be.
        example: Images `[N, C, H, W]`.

    Source: Ma et al. 2023, "MRECG" (arXiv 2303.11906), equations 8 and 9; the factor 1.6 is that of their appendix as recalled.
    """
    calls = watch(model, {unit.name for unit in units}, example)

    def meet(a: Unit, b: Unit) -> bool:
        y, x = calls[a.name].y, calls[b.name].x
        if y is None or x is None:
            return False
        y = y if a.activation is None else a.activation(y)
        return y.shape == x.shape and torch.equal(y, x)

    possible = [meet(a, b) for a, b in itertools.pairwise(units)]
    if not any(possible):
        raise QexpError("reconstruction: join finds no two units of which one takes the other's result; use join: 0")
    capacities = [capacity(model, unit) for unit in units]
    chosen = largest_steps(capacities, k, possible)
    out: list[Unit] = []
    for i, unit in enumerate(units):
        if i and i - 1 in chosen:
            first = out.pop()
            before = (*first.before, Unit(first.name, first.layers, first.activation))
            out.append(Unit(unit.name, (*first.layers, *unit.layers), unit.activation, before))
        else:
            out.append(unit)
    log.info("reconstruction: learned as one: %s", "; ".join(" and ".join(u.modules) for u in out if u.before))
    return out
