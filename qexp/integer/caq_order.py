"""The tensors with exponents in CAQ's engine, in its order: the images, then one result per weighted layer."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from qexp.errors import QexpError
from qexp.layers.quantized import WEIGHTED, float_class, quantizers
from qexp.models.modules import Add
from qexp.network.facts import Facts
from qexp.network.quantizer_before import arriving, at_output, leaving
from qexp.quantizers.base import Quantizer
from qexp.quantizers.caq import CAQShift

IMAGES = "data"


@dataclass(frozen=True)
class Held:
    """A tensor the engine holds.

    Attributes:
        name: `data`, or the weighted layer whose result it is.
        exponents: Exponents of its channels, in order.
        site: Layer and site of the quantizer they belong to.
    """

    name: str
    exponents: tuple[int, ...]
    site: tuple[str, str]


def held(model: nn.Module, facts: Facts) -> list[Held]:
    """Returns the images and the result of each weighted layer, in the engine's order.

    A layer's result is the output of its batch norm, if it has one. Maxima, averages, sums and ReLUs use the exponents of the results
    they read: results that are added share one vector.

    Raises:
        QexpError: One of these tensors has no exponents; the message names it.
    """
    layers = in_order(model, facts)
    found = [(IMAGES, arriving(model, facts, facts.first)), *((name, _result(model, facts, name)) for name in layers)]
    bare = [name for name, q in found if not isinstance(q, CAQShift)]
    if bare:
        more = f" and {len(bare) - 4} more" if len(bare) > 4 else ""
        raise QexpError(
            f"export=fpga: the results of {', '.join(bare[:4])}{more} have no power-of-two exponents, and"
            " CAQ's engine needs those of the images and of every weighted layer; run quant=caq_shift, or quant=inq "
            "with 4-bit weights (bits=w4a8)"
        )
    sites = {id(q): (layer, site) for layer, site, q in reversed(list(quantizers(model)))}
    return [Held(name, tuple(q.exponents.tolist()), sites[id(q)]) for name, q in found]


def in_order(model: nn.Module, facts: Facts) -> list[str]:
    """Returns the weighted layers as the engine computes them: as they run, but a shortcut's convolution before its block's."""
    order = [n for n in facts.order if issubclass(float_class(model.get_submodule(n)), WEIGHTED)]
    before: dict[str, frozenset[str]] = {}
    for name in facts.order:
        if not issubclass(float_class(model.get_submodule(name)), Add) or len(facts.sources.get(name, ())) < 2:
            continue
        reach = [_reach(operand, facts, before) for operand in facts.sources[name][:2]]
        branches = [[n for n in order if n in reach[i] - reach[1 - i]] for i in (0, 1)]
        shortcut, block = sorted(branches, key=len)
        if shortcut and len(shortcut) < len(block):
            rest = [n for n in order if n not in shortcut]
            at = rest.index(block[0])
            order = rest[:at] + shortcut + rest[at:]
    return order


def _reach(names: tuple[str, ...], facts: Facts, known: dict[str, frozenset[str]]) -> frozenset[str]:
    """Returns all layers that took part in computing a tensor."""
    out = frozenset(names)
    for name in names:
        if name not in known:
            known[name] = frozenset()  # a layer that runs again later ends the search
            operands = facts.sources.get(name, ())
            known[name] = frozenset().union(*(_reach(operand, facts, known) for operand in operands))
        out |= known[name]
    return out


def _result(model: nn.Module, facts: Facts, layer: str) -> Quantizer | None:
    last = facts.bn_of.get(layer, layer)
    return at_output(model, last) or leaving(model, facts, last) or at_output(model, layer)
