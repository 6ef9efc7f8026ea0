"""Sums of two 8-bit tensors get scales with which no pair of codes lies so near to a tie that runtimes round it differently."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from qexp.layers.quantized import Quantized, quantized_layers
from qexp.models.modules import Add
from qexp.network.facts import Facts
from qexp.network.quantizer_before import arriving
from qexp.passes.base import Moment, Pass
from qexp.quantizers.base import Quantizer
from qexp.quantizers.uniform import Uniform

log = logging.getLogger(__name__)
TRIES = 6000
STEP = 2.0**-19  # of a scale, from one try to the next: six thousand of them are about one percent
WORD = 2.0**-23  # what four float32 operations may lose of a number


class ClearSums(Pass):
    """Raises the scale of one operand of each residual sum, by a percent at most, until no sum of two codes is nearly a tie.

    Runtimes compute `(a - za) * sa / sy + (b - zb) * sb / sy` in float32, each in its own order, and one sum in a million lies where the
    order decides the code; two layers later it is thousands. There are but 65,536 pairs of codes, so all of them are tried. The operand
    is one whose quantizer nothing else uses. Sums of more than 8 bits, or with learned scales that still move, are left alone.
    """

    @torch.no_grad()
    def on_fitted(self, model: nn.Module, moment: Moment) -> None:
        self.on_trained(model, moment)

    @torch.no_grad()
    def on_trained(self, model: nn.Module, moment: Moment) -> None:
        users: dict[int, int] = {}
        for _, layer in quantized_layers(model):
            for site in layer.sites:
                users[id(layer.site(site))] = users.get(id(layer.site(site)), 0) + 1
        for name, layer in quantized_layers(model):
            if isinstance(layer, Add):
                operands = [layer.site(f"input.{i}") for i in range(2)]
                free = [q for q in operands if isinstance(q, Uniform) and users[id(q)] == 1]
                grids = _readers(model, moment.facts, name)
                if free and grids and all(map(_narrow, (*operands, *grids))):
                    _clear(name, free[0], next(q for q in operands if q is not free[0]), grids)


def _narrow(quantizer: nn.Module) -> bool:
    """Whether a quantizer has one scale and at most 8 bits."""
    scale = getattr(quantizer, "scale", None)
    return (
        isinstance(quantizer, Quantizer)
        and quantizer.bits <= 8
        and isinstance(scale, torch.Tensor)
        and scale.numel() == 1
    )


def _readers(model: nn.Module, facts: Facts, name: str) -> list[Quantizer]:
    """Returns the quantizers that a sum passes next, through layers that only clamp or move codes."""
    found: list[Quantizer] = []
    module = model.get_submodule(name)
    own = module.site("output") if isinstance(module, Quantized) and "output" in module.sites else None
    if isinstance(own, Quantizer):
        return [own]
    for consumer in facts.consumers(name):
        for operand, names in enumerate(facts.sources[consumer]):
            if name in names:
                quantizer = arriving(model, facts, consumer, operand)
                found += _readers(model, facts, consumer) if quantizer is None else [quantizer]
    return found


def _clear(name: str, free: Quantizer, other: Quantizer, grids: Sequence[Quantizer]) -> None:
    """Raises the scale of `free` until no sum is nearly a tie on any grid."""
    a, b = (_codes(q) for q in (free, other))
    first, fixed = np.float32(free.scale.item()), b * float(other.scale)
    readers = {(float(q.scale), int(q.zero_point), *map(int, q.limits)) for q in grids}
    for k in range(TRIES):
        scale = np.float32(first * (1 + k * STEP))
        if not any(_near_a_tie(a * float(scale), fixed, *grid) for grid in readers):
            free.scale.fill_(float(scale))
            if k:
                log.debug("%s: scale of %s raised by %.3g percent", name, free.name, 100 * k * STEP)
            return
    log.warning("%s: some sums of two codes lie so near to a tie that runtimes may round them differently", name)


def _near_a_tie(a: NDArray, b: NDArray, scale: float, zero: int, low: int, high: int) -> bool:
    """Whether a sum of `a [A]` and `b [B]` lies where float32 does not tell on which side of a tie it is."""
    x, y = (a / scale)[:, None], (b / scale)[None]
    total = x + y
    slack = WORD * (np.abs(x) + np.abs(y) + np.abs(total) + abs(zero) + 1)
    off = np.abs(total - np.floor(total) - 0.5)
    inside = (total > low - zero - 1) & (total < high - zero + 1)
    return bool(((off < slack) & inside).any())


def _codes(quantizer: Quantizer) -> NDArray:
    """Returns the codes of a grid, less their zero."""
    low, high = map(int, quantizer.limits)
    return np.arange(low, high + 1, dtype=np.float64) - float(quantizer.zero_point)
