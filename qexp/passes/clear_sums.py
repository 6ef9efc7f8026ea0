"""Gives sums of two 8-bit tensors scales at which no sum is so near a tie that runtimes round it differently."""

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
from qexp.passes.base import Pass, PassContext
from qexp.quantizers.base import Quantizer
from qexp.quantizers.uniform import Uniform

log = logging.getLogger(__name__)
TRIES = 6000
STEP = 2.0**-19  # of a scale, from one try to the next: six thousand of them are about one percent
WORD = 2.0**-23  # relative error of four float32 operations
FAR = 2.0  # smallest distance of a sum from a tie, in such errors of the zero points' part


class ClearSums(Pass):
    """Raises the scale of one operand of each residual sum, by one percent at most, until no sum of two codes is nearly a tie.

    Runtimes compute `(a - za) * sa / sy + (b - zb) * sb / sy` in float32, each in its own order. For one sum in a million the order
    decides the code; two layers later thousands of codes differ. There are only 65,536 pairs of codes, so the pass tries all of them.
    Some runtimes compute the zero points' part, `za * sa / sy + zb * sb / sy`, as one number, and its rounding error is the same for
    small sums. The pass takes the first scale with a margin for that error, or else the scale with the largest margin. It changes an
    operand whose quantizer nothing else uses. Sums of more
    than 8 bits, or with learned scales that still move, are left alone.
    """

    @torch.no_grad()
    def on_fitted(self, model: nn.Module, context: PassContext) -> None:
        self.on_trained(model, context)

    @torch.no_grad()
    def on_trained(self, model: nn.Module, context: PassContext) -> None:
        users: dict[int, int] = {}
        for _, layer in quantized_layers(model):
            for site in layer.sites:
                users[id(layer.site(site))] = users.get(id(layer.site(site)), 0) + 1
        for name, layer in quantized_layers(model):
            if isinstance(layer, Add):
                operands = [layer.site(f"input.{i}") for i in range(2)]
                free = [q for q in operands if isinstance(q, Uniform) and users[id(q)] == 1]
                grids = _readers(model, context.facts, name, set())
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


def _readers(model: nn.Module, facts: Facts, name: str, seen: set[str]) -> list[Quantizer]:
    """Returns the quantizers that a sum reaches next, through layers that only clamp or move codes, or join them with others."""
    found: list[Quantizer] = []
    module = model.get_submodule(name)
    own = module.site("output") if isinstance(module, Quantized) and "output" in module.sites else None
    if isinstance(own, Quantizer):
        return [own]
    seen.add(name)
    for consumer, operands in facts.reached.items():
        for operand, names in enumerate(operands):
            if name in names and consumer not in seen:
                quantizer = arriving(model, facts, consumer, operand)
                found += _readers(model, facts, consumer, seen) if quantizer is None else [quantizer]
    return found


def _clear(name: str, free: Quantizer, other: Quantizer, grids: Sequence[Quantizer]) -> None:
    """Raises the scale of `free` until no sum is nearly a tie on any grid."""
    a, b = (_codes(q) for q in (free, other))
    first, fixed = np.float32(free.scale.item()), b * float(other.scale)
    readers = {(float(q.scale), int(q.zero_point), *map(int, q.limits)) for q in grids}
    zeros, best, most = (float(free.zero_point), float(other.zero_point) * float(other.scale)), None, -1.0
    for k in range(TRIES):
        scale = np.float32(first * (1 + k * STEP))
        apart = abs(zeros[0] * float(scale)) + abs(zeros[1])
        room = np.inf
        for grid in readers:
            room = min(room, _room(a * float(scale), fixed, apart, *grid))
            if room <= most:
                break
        if room > most:
            best, most = (k, scale), room
        if most >= FAR:
            break
    if best is None:
        log.warning("%s: some sums of two codes lie so near to a tie that runtimes may round them differently", name)
        return
    free.scale.fill_(float(best[1]))
    if best[0]:
        log.debug("%s: scale of %s raised by %.3g percent", name, free.name, 100 * best[0] * STEP)


def _room(a: NDArray, b: NDArray, apart: float, scale: float, zero: int, low: int, high: int) -> float:
    """Returns the distance of the sums of `a [A]` and `b [B]` from ties, in float32 errors of `apart`; -1 if one is nearly a tie."""
    x, y = (a / scale)[:, None], (b / scale)[None]
    total = x + y
    slack = WORD * (np.abs(x) + np.abs(y) + np.abs(total) + abs(zero) + 1)
    off = np.abs(total - np.floor(total) - 0.5)
    inside = (total > low - zero - 1) & (total < high - zero + 1)
    clear = float((off - slack).min(initial=np.inf, where=inside))
    return -1.0 if clear < 0 else clear / (WORD * apart / scale) if apart else np.inf


def _codes(quantizer: Quantizer) -> NDArray:
    """Returns the codes of a grid minus their zero point."""
    low, high = map(int, quantizer.limits)
    return np.arange(low, high + 1, dtype=np.float64) - float(quantizer.zero_point)
