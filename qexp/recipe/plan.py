"""The plan: a table with one row per tensor, which holds its quantizer and the rule that decided it."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from functools import partial
from typing import Any

import pandas as pd
from torch import nn

from qexp.errors import QexpError
from qexp.layers.calls import use_needed
from qexp.layers.quantized import Quantized, channel_axis, quantized_layers, transposed_blocks
from qexp.layers.swap import swap
from qexp.network.facts import Facts
from qexp.network.linking import link
from qexp.numerics.granularity import PerBlock, PerChannel, granularity
from qexp.quantizers.base import Quantizer
from qexp.system.objects import HINTS, find, make


class Source(Enum):
    """The setting that decided how a tensor is quantized."""

    DEFAULT = "default"  # the method's default for the site
    WIDTH = "width"  # one width for all layers
    RULE = "rule"  # a named rule of the recipe
    NAMED = "named"  # a list or a mapping of widths
    PLAN = "plan"  # a `layers.csv`
    ARRIVES = "arrives"  # the tensor is the quantized output of another layer
    STAGE = "stage"  # a stage of a progressive training
    SEARCH = "search"  # a search under a budget


@dataclass(frozen=True)
class Entry:
    """One tensor of one layer.

    Attributes:
        layer, site: The tensor.
        spec: Specification of its quantizer (`_target_` and arguments); None leaves the tensor in float.
        bits: Its width; 32 is float.
        source: The kind of setting that decided.
        by: The setting itself, for people: `quant.rules.ends`, `layer_wbit[3]`.
    """

    layer: str
    site: str
    spec: dict[str, Any] | None
    bits: int
    source: Source
    by: str


@dataclass(frozen=True)
class Plan:
    """All entries, in order of execution."""

    entries: tuple[Entry, ...]

    def __iter__(self) -> Iterator[Entry]:
        return iter(self.entries)

    def __len__(self) -> int:
        return len(self.entries)

    def __getitem__(self, key: tuple[str, str]) -> Entry:
        for entry in self.entries:
            if (entry.layer, entry.site) == key:
                return entry
        raise KeyError(key)

    def bits(self, site: str) -> dict[str, int]:
        """Returns the width of one site for each layer that has it."""
        return {e.layer: e.bits for e in self.entries if e.site == site}

    def operand_bits(self) -> dict[tuple[str, int], int]:
        """Returns the width of each operand that has a quantizer, of layers with several, by (layer, number)."""
        operands = [e for e in self.entries if e.site.startswith("input.")]
        return {(e.layer, int(e.site.removeprefix("input."))): e.bits for e in operands}

    def frame(self) -> pd.DataFrame:
        """Returns the plan as a table: layer, site, quantizer, bits, granularity, signed, range, rule."""
        rows = []
        for e in self.entries:
            spec = e.spec or {}
            target = str(spec.get("_target_", "float")).rsplit(".", 1)[-1]
            rule = spec.get("range") or ""
            rule = str(rule["_target_"]).rsplit(".", 1)[-1] if isinstance(rule, dict) else rule
            rows.append(
                {
                    "layer": e.layer,
                    "site": e.site,
                    "quantizer": target.lower(),
                    "bits": e.bits,
                    "granularity": spec.get("granularity", "tensor") if e.spec else "",
                    "signed": spec.get("signed", "auto") if e.spec else "",
                    "range": str(rule).lower() if e.spec else "",
                    "rule": e.by,
                    "source": e.source.value,
                }
            )
        return pd.DataFrame(rows)


def apply(model: nn.Module, plan: Plan, facts: Facts) -> None:
    """Attaches the plan's quantizers to the model, in place; sites with the same `share` name get one quantizer.

    Layers that compute on integers are linked to the quantizers around them. Stand-ins of function calls without quantizers are taken out
    of use.

    Raises:
        QexpError: A quantizer does not allow its bits, granularity or site, or a layer cannot compute between the quantizers
            around it. The message names layer and site.
    """
    shared: dict[str, Quantizer] = {}
    made: dict[str, partial] = {}
    by_layer: dict[str, dict[str, nn.Module]] = {}
    computes: dict[str, dict[str, Any]] = {}
    for entry in plan:
        by_layer.setdefault(entry.layer, {})
        if entry.site == "compute":
            computes[entry.layer] = dict(entry.spec or {})
        elif entry.spec is not None:
            by_layer[entry.layer][entry.site] = build(model, entry, facts, shared, made)
    device = next((t.device for t in model.parameters()), None)
    for name, sites in by_layer.items():
        if not sites and name not in computes:
            continue
        try:
            layer = model.get_submodule(name)
            swap(layer, sites, computes.get(name), device)
            layer.shaped(facts.shapes[name])
        except QexpError as error:
            raise QexpError(f"{name}: {error}") from None
    use_needed(model)
    for name, layer in quantized_layers(model):
        for site in layer.sites:
            if isinstance(layer.site(site), Quantizer):
                layer.site(site).attach(layer, _sources(model, facts, name))
    link(model, facts)


def _sources(model: nn.Module, facts: Facts, name: str) -> tuple[tuple[nn.Module, str], ...]:
    """Returns the sites whose quantizers the first operand may have passed: its own site, then the results it is made of."""
    layer = model.get_submodule(name)
    own = [(layer, site) for site in ("input", "input.0") if site in layer.sites]
    before = [model.get_submodule(n) for n in (facts.sources.get(name) or ((),))[0]]
    return (*own, *((m, "output") for m in before if isinstance(m, Quantized) and "output" in m.sites))


def build(
    model: nn.Module,
    entry: Entry,
    facts: Facts,
    shared: dict[str, Quantizer],
    made: dict[str, partial] | None = None,
) -> Quantizer:
    """Returns the quantizer of an entry, with buffers in the tensor's shape.

    Args:
        model, entry, facts: The model, the entry, and the facts of the model's graph.
        shared: Quantizers with a `share` name that exist so far; the function may add one.
        made: Makers of the specifications so far, which many entries have in common; the function may add one.
    """
    spec = dict(entry.spec or {})
    share = spec.pop("share", None)
    if share in shared:
        first = shared[share]
        if first.bits != entry.bits:
            raise QexpError(
                f"{entry.layer} ({entry.site}): shares {share!r} with {first.name}, which has {first.bits} bits, not {entry.bits}; "
                "tensors that share a quantizer have one width"
            )
        return first
    spec.pop("bits", None)
    if "_target_" not in spec:
        raise QexpError(f"{entry.layer} ({entry.site}): no quantizer is named; name one with _target_")
    layer = model.get_submodule(entry.layer)
    shape = facts.shapes[entry.layer].get(entry.site)
    where = f"{entry.layer} ({entry.site})"
    if shape is None:
        raise QexpError(f"{where}: the layer has no such tensor; it has {', '.join(facts.shapes[entry.layer])}")
    axis = channel_axis(layer, entry.site, len(shape))
    shape = (1, *shape[1:]) if axis and entry.site != "weight" else shape
    try:
        shared_scale = granularity(spec.pop("granularity", "tensor"), axis)
        if entry.site == "weight" and isinstance(shared_scale, PerChannel) and (blocks := transposed_blocks(layer)):
            shared_scale = PerBlock(blocks=blocks)
        quantizer = _maker(spec, {} if made is None else made)(bits=entry.bits, shape=shape, granularity=shared_scale)
    except (QexpError, TypeError) as error:  # the method has no such argument
        raise QexpError(f"{where}: {error}") from None
    quantizer.name = where
    if share:
        shared[share] = quantizer
    return quantizer


def _maker(spec: dict[str, Any], made: dict[str, partial]) -> partial:
    """Returns a function that makes a specification's quantizers; nested objects (range rules) are new at each call."""
    key = repr(sorted(spec.items()))
    if key not in made:
        kind = find(spec)
        if isinstance(kind, type) and issubclass(kind, Quantizer):
            kind.require_arguments(name for name in spec if name not in HINTS)
        made[key] = make(spec, as_partial=True)
    return copy.deepcopy(made[key])
