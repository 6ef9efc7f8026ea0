"""Bit widths as a user types them: one number, a list with one entry per group of the model, or a mapping of patterns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from qexp.errors import QexpError
from qexp.numerics.widths import FLOAT, width
from qexp.recipe.patterns import match

Group = str | Sequence[str]


@dataclass(frozen=True)
class Bits:
    """Widths of one kind of tensor: `default` for every layer, and `named` with bits and source per layer.

    `many` holds the layers that a list entry or a pattern names together with others. A rule may leave one of these in float; a layer
    named alone must get its width.
    """

    default: int | None = None
    named: dict[str, tuple[int, str]] = field(default_factory=dict)
    many: frozenset[str] = frozenset()


def parse(
    value: Any, key: str, groups: Sequence[Group] | None, layers: Sequence[str], places: dict[str, Sequence[str]]
) -> Bits:
    """Returns the widths that `layer_wbit` or `layer_abit` gives.

    Args:
        value: A number, a list with one entry per group (a last entry `...` repeats the one before it), or `{pattern: bits}`.
            32 is float.
        key: `layer_wbit` or `layer_abit`, for messages.
        groups: The model's groups, each a module name or several.
        layers: Names of all layers that can carry quantizers.
        places: Layers that `@first`, `@last`, `@ends` stand for.

    Raises:
        QexpError: A value is not a width, a list has the wrong length, or a pattern matches no layer.
    """
    if value is None:
        return Bits(FLOAT)
    if isinstance(value, Mapping):
        named: dict[str, tuple[int, str]] = {}
        many: set[str] = set()
        for pattern, bits in value.items():
            hits = match(str(pattern), layers, key, places)
            many = many | set(hits) if len(hits) > 1 else many - set(hits)
            for layer in hits:
                named[layer] = (width(bits, f"{key}[{pattern}]"), f"{key}[{pattern}]")
        return Bits(None, named, frozenset(many))
    if isinstance(value, Sequence) and not isinstance(value, str):
        named = _from_list(list(value), key, groups, layers)
        return Bits(None, named, frozenset(named))
    return Bits(width(value, key))


def _from_list(
    entries: list[Any], key: str, groups: Sequence[Group] | None, layers: Sequence[str]
) -> dict[str, tuple[int, str]]:
    if not groups:
        raise QexpError(
            f"{key} is a list, but this model names no groups (model.groups); give one number or a mapping {{pattern: bits}}"
        )
    names = [" + ".join(_prefixes(g)) for g in groups]
    if entries and entries[-1] == "...":
        if len(entries) < 2 or len(entries) - 1 > len(groups):
            raise QexpError(
                f"{key}: '...' repeats the entry before it up to {len(groups)} groups, got {len(entries) - 1} entries before it"
            )
        entries = entries[:-1] + [entries[-2]] * (len(groups) - len(entries) + 1)
    if len(entries) != len(groups):
        raise QexpError(
            f"{key} has {len(entries)} entries, but the model has {len(groups)} groups: {', '.join(names)} "
            "(a last entry '...' repeats the one before it)"
        )
    named = {}
    for i, (bits, group) in enumerate(zip(entries, groups)):
        hits = [layer for layer in layers if any(layer == p or layer.startswith(p + ".") for p in _prefixes(group))]
        if not hits:
            raise QexpError(f"model.groups[{i}] = {names[i]!r} holds no layer of the model")
        for layer in hits:
            named[layer] = (width(bits, f"{key}[{i}]"), f"{key}[{i}]")
    return named


def _prefixes(group: Group) -> list[str]:
    return [group] if isinstance(group, str) else list(group)
