"""Resolves a recipe: defaults, then one width for all, then named rules in order, then settings per layer; later wins."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from torch import nn

from qexp.errors import QexpError, near
from qexp.layers.quantized import QUANTIZED, WEIGHTED, float_class
from qexp.network.facts import Facts
from qexp.numerics import widths as bit_widths
from qexp.numerics.widths import FLOAT
from qexp.recipe.bits import Bits, Group, parse
from qexp.recipe.patterns import NoSuchLayer, match
from qexp.recipe.plan import Entry, Plan, Source
from qexp.recipe.plan_file import Row, read_rows, tell_differences

COMPUTE = "compute"  # not a tensor, but the layer's way to compute (a class of qexp/layers, with its options)
SITES = ("input", "weight", "bias", "output", "running_mean", "running_var", "grad_output", COMPUTE)
_RULE_KEYS = {
    "layers",
    "types",
    "optional",
    "missing",
    "follow",
    "alone",
    "own_width",
    *SITES,
    *(f"input.{i}" for i in range(8)),
}
LIKE = "like"  # key of a rule: starts from the recipe's quantizer of another site
ENDS = "ends"  # the rule that every recipe has; a list or plan that also names the ends may overrule it


@dataclass(frozen=True)
class Recipe:
    """The user's quantization settings, independent of the model's layers.

    Attributes:
        sites: Default quantizer of each site of a weighted layer (`_target_` and arguments), None for float.
        rules: Named edits, in order: `{layers: patterns, types: [class names], <site>: {changes} or None}`. `optional: true` allows a
            rule without effect, since a recipe for any network may name types that this network lacks. `missing: true` edits only
            tensors without a quantizer so far. `follow: true` gives a tensor the quantizer of another layer that reads the same
            tensor. `alone: true` edits only batch norms that follow no convolution. `own_width: true` gives results the width that
            lists and mappings hold for their own layer, instead of the width of the layer that reads them. Changes with `like: SITE`
            start from the default of that site:
            `output: {like: input, range: 6.0}`.
        wbit, abit: Widths of weights and of inputs: a number, a list per group, or `{pattern: bits}`.
        groups: The model's groups, which lists address.
        first, last: Names of the first and last layer; None takes them from the graph.
        plan: A `layers.csv` that names widths for layers.
    """

    sites: Mapping[str, Mapping[str, Any] | None]
    rules: Mapping[str, Mapping[str, Any] | None] = field(default_factory=dict)
    wbit: Any = 8
    abit: Any = 8
    groups: Sequence[Group] | None = None
    first: str | Sequence[str] | None = None
    last: str | Sequence[str] | None = None
    plan: Path | None = None


def resolve(model: nn.Module, facts: Facts, recipe: Recipe) -> Plan:
    """Returns the plan: quantizer, width and deciding rule of each tensor of each layer. Changes nothing.

    Raises:
        QexpError: A pattern matches nothing, a rule changes nothing, a key is unknown, or a list has the wrong length.
    """
    layers = list(facts.order)
    places = _places(facts, recipe)
    left = _left_float(recipe.rules, facts.strays)
    if strays := [stray for stray in facts.strays if stray not in left and _quantizes(recipe)]:
        known = ", ".join(sorted({kind.__name__ for kind in QUANTIZED}))
        raise QexpError(
            f"{_few(strays)} compute with weights that cannot carry quantizers; the layer types known are {known}. "
            f"Leave them in float with a rule (quant.rules.NAME: {{layers: {_bare(strays[0])!r}, weight: null}}), choose another model, "
            "or add a class to qexp/layers/quantized.py"
        )
    weighted = [n for n in layers if issubclass(float_class(model.get_submodule(n)), WEIGHTED)]
    with _saying_what_was_folded(model):
        wbits = parse(recipe.wbit, "layer_wbit", recipe.groups, layers, places)
        abits = parse(recipe.abit, "layer_abit", recipe.groups, layers, places)

    table: dict[tuple[str, str], Entry] = {}
    for name in layers:
        for site in _sites(model, name, facts):
            spec = _default(recipe.sites, site) if name in weighted else None
            table[name, site] = _fresh(name, site, spec, wbits, abits)

    changed_by: dict[str, list[tuple[str, str]]] = {}
    own_width: set[str] = set()
    for rule_name, rule in recipe.rules.items():
        if rule is not None:
            if rule_name in left.values():  # one effect is enough
                rule = {**rule, "optional": True}
            with _saying_what_was_folded(model):
                alone = isinstance(rule, Mapping) and rule.get("alone")
                hits = [n for n in layers if n not in facts.bn_of.values()] if alone else layers
                touched = _apply_rule(rule_name, rule, table, hits, model, recipe, places, (wbits, abits), weighted)
            if rule.get("own_width"):
                own_width |= {layer for layer, site in touched if site == "output"}
            if not rule.get("optional"):
                changed_by[rule_name] = touched
    _name_widths(table, wbits, abits, facts, weighted, own_width)
    rows = read_rows(Path(recipe.plan), layers) if recipe.plan is not None else {}
    _take_plan(table, recipe.plan, rows, recipe.sites)
    _reject_idle_rules(table, changed_by, recipe.rules)
    _quantize_once(table, facts)
    _follow(table, facts, {f"quant.rules.{name}" for name, rule in recipe.rules.items() if rule and rule.get("follow")})
    settled = [e if _carries(e) else replace(e, spec=None) for e in table.values()]
    plan = Plan(
        tuple(e for e in settled if e.spec is not None or (e.site in ("input", "weight") and e.layer in weighted))
    )
    if rows:
        found = plan.frame().astype(str).to_dict("records")
        tell_differences(Path(recipe.plan), rows, {(row["layer"], row["site"]): row for row in found})
    return plan


def _quantizes(recipe: Recipe) -> bool:
    return bool(recipe.rules or any(recipe.sites.values()) or recipe.plan)


def _bare(stray: str) -> str:
    """Returns the module name at the start of an entry of `strays`."""
    return stray.partition(" (")[0]


def _left_float(rules: Mapping[str, Any], strays: Sequence[str]) -> dict[str, str]:
    """Returns the layers of `strays` that a rule leaves in float by name (`weight: null`), each with that rule."""
    left = {}
    for name, rule in rules.items():
        if not isinstance(rule, Mapping) or "weight" not in rule or rule["weight"] is not None:
            continue
        patterns = rule.get("layers") or ()
        for pattern in [patterns] if isinstance(patterns, str) else patterns:
            left |= {stray: name for stray in strays if fnmatchcase(_bare(stray), pattern)}
    return left


@contextmanager
def _saying_what_was_folded(model: nn.Module) -> Iterator[None]:
    """Adds to the error of a pattern without a layer that its module existed before batch norms were folded."""
    try:
        yield
    except NoSuchLayer as error:
        gone = [n for n, m in model.named_modules() if type(m) is nn.Identity and fnmatchcase(n, error.pattern)]
        if not gone:
            raise
        raise QexpError(
            f"{error}. {_few(gone)} {'does' if len(gone) == 1 else 'do'} nothing here, such as a batch norm that was folded into its "
            "convolution: bn=keep leaves batch norms in place"
        ) from None


def _few(names: Sequence[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


def _carries(entry: Entry) -> bool:
    """Whether the tensor is quantized; an entry without a width keeps its spec until all width sources are applied."""
    return entry.spec is not None and (entry.bits < FLOAT or entry.site == COMPUTE)


def _places(facts: Facts, recipe: Recipe) -> dict[str, list[str]]:
    def names(given: str | Sequence[str] | None, found: str, what: str) -> list[str]:
        chosen = [found] if given is None else [given] if isinstance(given, str) else list(given)
        for name in chosen:
            if name not in facts.order:
                raise QexpError(f"model.{what} = {name!r} is not a layer of the model{near(name, list(facts.order))}")
        return chosen

    first, last = names(recipe.first, facts.first, "first"), names(recipe.last, facts.last, "last")
    return {"@first": first, "@last": last, "@ends": first + last}


def _sites(model: nn.Module, name: str, facts: Facts) -> list[str]:
    """Returns the sites of a layer that exist (a layer without bias has no bias site), and its way to compute."""
    return [s for s in QUANTIZED[float_class(model.get_submodule(name))].sites if s in facts.shapes[name]] + [COMPUTE]


def _default(sites: Mapping[str, Mapping[str, Any] | None], site: str) -> dict[str, Any] | None:
    spec = sites.get(site)
    return copy.deepcopy(dict(spec)) if spec is not None else None


def _scalar(site: str, wbits: Bits, abits: Bits) -> tuple[int | None, str]:
    """Returns the common width of a site for all layers, and the key that holds it; None if no key does."""
    if site == "weight":
        return wbits.default, "layer_wbit"
    if site == "output" or site.startswith("input"):
        return abits.default, "layer_abit"
    return None, "quant"


def _fresh(layer: str, site: str, spec: dict[str, Any] | None, wbits: Bits, abits: Bits) -> Entry:
    """Returns a tensor's entry before any rule: its default quantizer at the common width."""
    width, key = _scalar(site, wbits, abits)
    if spec is None or site == COMPUTE:
        return Entry(layer, site, spec, FLOAT, Source.DEFAULT, "quant")
    if width is None:
        width = bit_widths.width(spec.get("bits", FLOAT), f"quant.{site}.bits", site)
        return Entry(layer, site, spec, width, Source.DEFAULT, "quant")
    return Entry(layer, site, spec, width, Source.WIDTH, key)


def _apply_rule(name, rule, table, layers, model, recipe, places, widths, weighted) -> list[tuple[str, str]]:
    where = f"quant.rules.{name}"
    if not isinstance(rule, Mapping):
        raise QexpError(f"{where}={rule} is not allowed; use a mapping, such as {{layers: conv1, weight: {{bits: 8}}}}")
    unknown = [key for key in rule if key not in _RULE_KEYS]
    if unknown:
        raise QexpError(
            f"{where}: unknown key {unknown[0]!r}{near(unknown[0], sorted(_RULE_KEYS))}; allowed are {', '.join(sorted(_RULE_KEYS))}"
        )
    optional = bool(rule.get("optional"))
    hits = list(layers)
    if rule.get("layers") is not None:
        hits = match(rule["layers"], layers, where, places, optional)
    if rule.get("types") is not None:
        types = [rule["types"]] if isinstance(rule["types"], str) else list(rule["types"])
        kinds = {float_class(model.get_submodule(n)).__name__ for n in layers}
        known = {cls.__name__ for cls in QUANTIZED}
        for kind in types:
            if kind not in known:
                raise QexpError(
                    f"{where}: {kind!r} is not a layer type that can carry quantizers{near(kind, sorted(known))}"
                )
        hits = [n for n in hits if float_class(model.get_submodule(n)).__name__ in types]
        if not hits and not optional:
            raise QexpError(f"{where}: no layer has a type of {types}; the model has {', '.join(sorted(kinds))}")
    elif rule.get("layers") is None:
        raise QexpError(f"{where}: names no layer; it needs `layers` or `types`")
    edits = {key: value for key, value in rule.items() if key in SITES or key.startswith("input.")}
    # Then a width for "*" puts no quantizers on batch norms and activations.
    mixed = any(layer in weighted for layer in hits)
    touched = []
    for layer in hits:
        for key, edit in edits.items():
            for site in [s for (n, s) in table if n == layer and (s == key or s.startswith(key + "."))]:
                before = table[layer, site]
                if rule.get("missing") and before.spec is not None:
                    continue
                if mixed and layer not in weighted and before.spec is None and _only_edits(edit):
                    continue
                after = _edit(before, edit, where, recipe, widths)
                if after is not before:
                    table[layer, site] = after
                    touched.append((layer, site))
    return touched


def _only_edits(edit: Any) -> bool:
    """Whether a rule changes options of an existing quantizer: it neither names a class nor removes the quantizer."""
    return isinstance(edit, Mapping) and not {"_target_", LIKE} & edit.keys()


def _edit(entry: Entry, edit: Any, where: str, recipe: Recipe, widths: tuple[Bits, Bits]) -> Entry:
    """Returns the entry after a rule's edit of its site; the same object if the rule changes nothing (bits: null)."""
    if edit is None:
        return Entry(entry.layer, entry.site, None, FLOAT, Source.RULE, where)
    if not isinstance(edit, Mapping):
        raise QexpError(
            f"{where}.{entry.site}={edit!r} is not allowed; use null (float) or a mapping such as {{bits: 8}}"
        )
    edit = {k: v for k, v in edit.items() if not (k == "bits" and v is None)}
    if not edit:
        return entry
    if LIKE in edit:
        base = _like(edit, where, entry, recipe)
        edit = {k: v for k, v in edit.items() if k != LIKE}
    else:
        base = entry.spec if entry.spec is not None else _default(recipe.sites, entry.site.split(".")[0]) or {}
    if "_target_" in edit and edit["_target_"] != base.get("_target_"):
        base = {}  # another method has other arguments
    if "_target_" not in edit and "_target_" not in base:
        raise QexpError(
            f"{where}.{entry.site}: {entry.layer} has no quantizer there to edit; name one with _target_, or start from the options of "
            "another site (like: input)"
        )
    spec = {**base, **edit}
    if entry.site == COMPUTE:
        return Entry(entry.layer, entry.site, spec, FLOAT, Source.RULE, where)
    width = edit.get("bits")
    if width is None:
        width = entry.bits if entry.bits < FLOAT else (_scalar(entry.site, *widths)[0] or FLOAT)
    else:
        width = bit_widths.width(width, f"{where}.{entry.site}.bits", entry.site)
    return Entry(entry.layer, entry.site, spec, width, Source.RULE, where)


def _like(edit: Mapping[str, Any], where: str, entry: Entry, recipe: Recipe) -> dict[str, Any]:
    """Returns the recipe's quantizer of the site that an edit wants to be like."""
    wanted = edit[LIKE]
    allowed = [site for site in SITES if site != COMPUTE and recipe.sites.get(site) is not None]
    if wanted not in allowed:
        raise QexpError(
            f"{where}.{entry.site}: like={wanted!r} is not a site that this recipe quantizes; use {' or '.join(allowed)}"
        )
    return _default(recipe.sites, wanted) or {}


def _name_widths(table: dict, wbits: Bits, abits: Bits, facts: Facts, weighted: list[str], own_width: set[str]) -> None:
    """Applies widths given as lists or mappings to inputs and weights of the named layers, and to the adds that feed them.

    Results of layers in `own_width` have the width of their own layer, if one is named.
    """
    for (layer, site), entry in list(table.items()):
        if site == "weight":
            width, key = wbits.named.get(layer, (None, ""))
        elif site.startswith("input"):
            width, key = abits.named.get(layer, (None, ""))
        elif site == "output" and layer in own_width and layer in abits.named:
            width, key = abits.named[layer]
        elif site == "output" and entry.spec is not None:
            fed = [c for c in facts.consumers(layer) if c in abits.named]
            # A layer that computes with the tensor decides; otherwise a layer that passes it on.
            fed = [c for c in fed if c in weighted] or fed
            width, key = min(abits.named[c] for c in fed) if fed else (None, "")
        else:
            continue
        if width is None or (entry.spec is None and layer not in weighted):
            continue
        if entry.spec is None and site != "weight" and _arrives_quantized(table, facts, layer, site):
            continue
        one_of_many = layer in (wbits if site == "weight" else abits).many
        if entry.spec is None and one_of_many and entry.source is Source.RULE:
            continue  # the entry names a group, and a rule leaves this one tensor of it in float
        if entry.spec is None and width < FLOAT:
            raise QexpError(
                f"{key}={width}: {layer} has no quantizer on its {site} (a rule or the recipe leaves it in float: {entry.by})"
            )
        table[layer, site] = Entry(layer, site, entry.spec, width, Source.NAMED, key)


def _take_plan(table: dict, path: Path | None, rows: Mapping[tuple[str, str], Row], sites: Mapping[str, Any]) -> None:
    for key, width in ((key, row.bits) for key, row in rows.items()):
        if key not in table:
            if width < FLOAT:
                raise QexpError(f"plan={path}: {key[0]} has no site {key[1]!r}")
            continue
        spec = table[key].spec if table[key].spec is not None else _default(sites, key[1].split(".")[0])
        if spec is None and width < FLOAT:
            raise QexpError(
                f"plan={path}: {key[0]} ({key[1]}) has {width} bits, but the recipe has no quantizer for it"
            )
        table[key] = Entry(*key, spec, width, Source.PLAN, "plan")


def _reject_idle_rules(table: dict, changed_by: dict[str, list[tuple[str, str]]], rules: Mapping[str, Any]) -> None:
    """Raises if all edits of a rule were overruled. The rule `ends` may be overruled; it is empty when ends_bit is null."""
    for name, touched in changed_by.items():
        decided = any(_decided(table[key], name) or _in_force(table[key], rules[name]) for key in touched)
        if not decided and name != ENDS:
            by = sorted({table[key].by for key in touched})
            reason = (
                f"all it names was decided by {', '.join(by)}"
                if touched
                else "it edits no tensor that has a quantizer (name one with _target_)"
            )
            raise QexpError(f"quant.rules.{name} changes nothing: {reason}; remove the rule or what overrules it")


def _decided(entry: Entry, name: str) -> bool:
    """Whether the rule of this name decided."""
    return entry.source is Source.RULE and entry.by == f"quant.rules.{name}"


def _in_force(entry: Entry, rule: Mapping[str, Any]) -> bool:
    """Whether a tensor is quantized at least partly by a rule, although another setting decided its width."""
    edit = rule.get(entry.site, rule.get(entry.site.split(".")[0]))
    said = {k: v for k, v in edit.items() if k != "bits"} if isinstance(edit, Mapping) else {}
    return _carries(entry) and (LIKE in said or any((entry.spec or {}).get(k) == v for k, v in said.items()))


def _arrives_quantized(table: dict, facts: Facts, layer: str, site: str) -> str | None:
    """Returns the layer whose quantized output an input is, None where it comes as a float."""
    operands = facts.sources.get(layer, ())
    operand = int(site.split(".")[1]) if "." in site else 0
    names = operands[operand] if operand < len(operands) else ()
    return next((n for n in names if (n, "output") in table and _carries(table[n, "output"])), None)


def _quantize_once(table: dict, facts: Facts) -> None:
    """Removes input quantizers from tensors that arrive quantized: one grid per tensor, with the width of the input."""
    for layer, site in list(table):
        source = _arrives_quantized(table, facts, layer, site) if site.startswith("input") else None
        if source is not None:
            bits = table[source, "output"].bits
            table[layer, site] = Entry(layer, site, None, bits, Source.ARRIVES, f"quantized at {source} (output)")


def _follow(table: dict, facts: Facts, rules: set[str]) -> None:
    """Gives inputs of rules with `follow` the quantizer of the layer that reads the same tensor: one grid per tensor."""
    read: dict[tuple[str, ...], tuple[str, str]] = {}
    for key, entry in table.items():
        if entry.site == "input" and _carries(entry) and not _by_rule(entry, rules):
            read.setdefault(_operand(facts, *key), key)
    for key, entry in table.items():
        first = read.get(_operand(facts, *key)) if _by_rule(entry, rules) and _carries(entry) else None
        if first is not None:
            name = f"{first[0]} ({first[1]})"
            spec = {"share": name} | dict(table[first].spec or {})
            table[first] = replace(table[first], spec=spec)
            table[key] = replace(entry, spec=spec, bits=table[first].bits)


def _operand(facts: Facts, layer: str, site: str) -> tuple[str, ...]:
    """Returns the layers that an input's tensor comes from; a tensor from no layer (images, functions) matches no other."""
    operands, number = facts.sources.get(layer, ()), int(site.split(".")[1]) if "." in site else 0
    known = site.startswith("input") and number < len(operands) and operands[number]
    return tuple(operands[number]) if known else ("", layer, site)


def _by_rule(entry: Entry, rules: set[str]) -> bool:
    """Whether one of the named rules decided."""
    return entry.source is Source.RULE and entry.by in rules
