"""The plan: a table with one row a tensor, which says what quantizer it carries, and which rule decided."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from torch import nn

from qexp.errors import QexpError, near
from qexp.layers.quantized import channel_axis
from qexp.layers.swap import swap
from qexp.network.facts import Facts
from qexp.numerics.granularity import granularity
from qexp.quantizers.base import Quantizer
from qexp.recipe.bits import width


@dataclass(frozen=True)
class Entry:
    """One tensor of one layer.

    Attributes:
        layer, site: Which tensor.
        spec: What makes its quantizer (`_target_` and arguments); None leaves it in float.
        bits: Its width; 32 is float.
        rule: Who decided.
    """

    layer: str
    site: str
    spec: dict[str, Any] | None
    bits: int
    rule: str


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
            rule = spec.get("range") or spec.get("init") or spec.get("alpha_init") or spec.get("k") or ""
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
                    "rule": e.rule,
                }
            )
        return pd.DataFrame(rows)


def read_bits(path: Path, layers: list[str]) -> dict[tuple[str, str], int]:
    """Returns the width of each (layer, site) that a `layers.csv` names.

    Raises:
        QexpError: No such file, missing columns, an unknown layer, a width that is none.
    """
    try:
        table = pd.read_csv(path, keep_default_na=False)
    except (OSError, pd.errors.ParserError, pd.errors.EmptyDataError) as error:
        raise QexpError(f"plan={path}: cannot be read ({error})") from None
    missing = {"layer", "site", "bits"} - set(table.columns)
    if missing:
        raise QexpError(
            f"plan={path}: columns {', '.join(sorted(missing))} are missing; a plan is the layers.csv of a run"
        )
    out = {}
    for row in table.itertuples():
        if str(getattr(row, "rule", "")).startswith("quantized at"):  # it arrives quantized; its source says how wide
            continue
        if row.layer not in layers:
            raise QexpError(f"plan={path}: the model has no layer {row.layer!r}{near(row.layer, layers)}")
        text = str(row.bits).strip()
        whole = text.removesuffix(".0")
        bits = width(int(whole) if whole.isdecimal() else text, f"plan={path}: {row.layer} ({row.site}), bits")
        out[row.layer, row.site] = bits
    return out


def apply(model: nn.Module, plan: Plan, facts: Facts) -> None:
    """Attaches the plan's quantizers to the model, in place; sites with the same `share` name get one quantizer.

    Raises:
        QexpError: A quantizer that refuses its bits, granularity or site, named by layer and site.
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


def build(
    model: nn.Module,
    entry: Entry,
    facts: Facts,
    shared: dict[str, Quantizer],
    made: dict[str, partial] | None = None,
) -> Quantizer:
    """Returns the quantizer an entry asks for, its buffers shaped for the tensor.

    Args:
        model, entry, facts: What to build it for.
        shared: Quantizers so far that have a `share` name; one is added.
        made: What specifications named so far, which many entries have in common; one is added.
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
        raise QexpError(f"{entry.layer} ({entry.site}): no quantizer is named; say which with _target_")
    layer = model.get_submodule(entry.layer)
    shape = facts.shapes[entry.layer].get(entry.site)
    where = f"{entry.layer} ({entry.site})"
    if shape is None:
        raise QexpError(f"{where}: the layer has no such tensor; it has {', '.join(facts.shapes[entry.layer])}")
    axis = channel_axis(layer, entry.site)
    shape = (1, *shape[1:]) if axis == 1 and entry.site not in ("weight",) else shape
    try:
        shared_scale = granularity(spec.pop("granularity", "tensor"), axis)
        quantizer = _maker(spec, {} if made is None else made)(bits=entry.bits, shape=shape, granularity=shared_scale)
    except InstantiationException as error:
        cause = error.__cause__ if error.__cause__ is not None else error
        raise QexpError(f"{where}: {cause}") from None
    except (QexpError, TypeError) as error:  # an argument the method does not know
        raise QexpError(f"{where}: {error}") from None
    quantizer.name = where
    if share:
        shared[share] = quantizer
    return quantizer


def _maker(spec: dict[str, Any], made: dict[str, partial]) -> partial:
    """Returns what makes a specification's quantizers: the class with its arguments, nested ones (range rules) anew each time."""
    key = repr(sorted(spec.items()))
    if key not in made:
        made[key] = instantiate(spec, _convert_="all", _partial_=True)
    return copy.deepcopy(made[key])
