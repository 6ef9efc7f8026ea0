"""Quantizers of every searched tensor at every width, fitted once, so that a model can switch widths at no cost."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn

from qexp.errors import QexpError
from qexp.layers.quantized import GRADIENT, QUANTIZED, WEIGHTED, Quantized, attribute, quantized_layers
from qexp.layers.swap import hold_weight, release_weight
from qexp.network.facts import Facts
from qexp.numerics.widths import FLOAT
from qexp.quantizers.base import Quantizer
from qexp.recipe.plan import Entry, Plan, Source, build

Key = tuple[str, str]  # a layer, and one of its sites


class QuantizersByWidth:
    """The quantizers of a calibrated model at several widths.

    The search covers weights and inputs of convolutions and linear layers that the plan quantizes, unless a rule fixes their width
    (first and last layer follow `ends_bit` unless it is null). Tensors that share a quantizer keep their width, since it belongs to
    several layers.

    Args:
        model: Model with the plan's quantizers attached and fitted.
        plan: The model's plan.
        facts: Facts of the model's graph.
        widths: Bits to choose from.
        fit: Fits every quantizer that is on the model, from the statistics the run has collected.
        layers: Pattern of the layers searched.
    """

    def __init__(
        self,
        model: nn.Module,
        plan: Plan,
        facts: Facts,
        widths: Sequence[int],
        fit: Callable[[], None],
        layers: str = "*",
    ) -> None:
        self.model, self.plan, self.widths = model, plan, sorted(set(widths))
        if not self.widths or not all(1 <= b <= 16 for b in self.widths):
            raise QexpError(f"search.widths={list(widths)} is not allowed; use one or more widths, each in 1..16")
        self.keys = [(e.layer, e.site) for e in plan if _searched(e, model, layers)]
        if not self.keys:
            raise QexpError(
                f"search: no quantized weight or input of a layer {layers!r} is left to choose (rules and float tensors keep their width)"
            )
        self._original = {
            (name, s): layer.site(s) for name, layer in quantized_layers(model) for s in layer.sites if s != GRADIENT
        }
        self._made: dict[tuple[str, str, int], Quantizer] = {}
        self._weights: dict[tuple[str, str, int], Tensor] = {}
        self._stock(facts, fit)

    def _stock(self, facts: Facts, fit: Callable[[], None]) -> None:
        """Makes and fits the quantizers, one width after the other, with the recipe's own fitting."""
        for bits in self.widths:
            for layer, site in self.keys:
                entry = self.plan[layer, site]
                if entry.bits == bits:  # the recipe has already fitted the plan's width
                    self._made[layer, site, bits] = self._original[layer, site]
                    continue
                self._made[layer, site, bits] = build(self.model, replace(entry, bits=bits), facts, {})
                self._set((layer, site), self._made[layer, site, bits])
            fit()
        self.restore()

    def bits(self, site: str) -> dict[str, int]:
        """Returns the plan's widths of the searched tensors of a site, by layer."""
        return {layer: self.plan[layer, s].bits for layer, s in self.keys if s == site}

    def quantizer(self, key: Key, bits: int) -> Quantizer:
        """Returns the fitted quantizer of a tensor at one width."""
        return self._made[*key, bits]

    def alone(self, key: Key, bits: int) -> None:
        """Quantizes one tensor; everything else is float."""
        self.nothing()
        layer = self.model.get_submodule(key[0])
        layer.enabled = True
        for name, site in self._original:
            if name == key[0]:
                self._set((name, site), nn.Identity())
        self._put(key, bits)

    def nothing(self) -> None:
        """Makes the whole network float, including tensors outside the search."""
        self.restore()
        for _, layer in quantized_layers(self.model):
            layer.enabled = False

    def take(self, choice: Mapping[Key, int]) -> None:
        """Gives each named tensor its width; other tensors keep the plan's."""
        self.restore()
        for key, bits in choice.items():
            self._put(key, bits)

    def restore(self) -> None:
        """Gives every tensor its width in the plan."""
        for key, quantizer in self._original.items():
            self._set(key, quantizer)
        for _, layer in quantized_layers(self.model):
            layer.enabled = True
        self._unbake()

    def plan_of(self, choice: Mapping[Key, int], rule: str) -> Plan:
        """Returns the plan with the chosen widths, decided by `rule`."""
        return Plan(
            tuple(
                replace(e, bits=choice[e.layer, e.site], source=Source.SEARCH, by=rule)
                if (e.layer, e.site) in choice
                else e
                for e in self.plan
            )
        )

    def _put(self, key: Key, bits: int) -> None:
        quantizer = self._made[*key, bits]
        self._set(key, quantizer)
        layer = self.model.get_submodule(key[0])
        if key[1] == "weight" and not layer.training:
            kept = self._weights.get((*key, bits))
            if kept is None:
                with torch.no_grad():
                    kept = self._weights[*key, bits] = quantizer(layer.weight).detach()
            hold_weight(layer, kept)

    def _set(self, key: Key, module: nn.Module) -> None:
        setattr(self.model.get_submodule(key[0]), attribute(key[1]), module)

    def _unbake(self) -> None:
        for _, layer in quantized_layers(self.model):
            release_weight(layer)

    def close(self) -> None:
        """Drops the weights held for evaluation; the network computes from its own again."""
        self._unbake()
        self._weights.clear()


def _searched(entry: Entry, model: nn.Module, pattern: str) -> bool:
    layer = model.get_submodule(entry.layer)
    return (
        entry.site in ("weight", "input")
        and entry.spec is not None
        and entry.bits < FLOAT
        and entry.source is not Source.RULE
        and "share" not in entry.spec
        and isinstance(layer, Quantized)
        and issubclass(layer.float_class, WEIGHTED)
        and type(layer)
        is QUANTIZED[layer.float_class]  # layers with other arithmetic need all their quantizers at once
        and fnmatchcase(entry.layer, pattern)
    )
