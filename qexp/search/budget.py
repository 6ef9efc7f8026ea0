"""Budgets and costs of widths: bytes, bit operations, mean bits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from qexp.errors import QexpError, near
from qexp.network.cost import LayerCost
from qexp.numerics.widths import FLOAT

KINDS = ("weight_bytes", "bops", "mean_wbit", "mean_abit")


@dataclass(frozen=True)
class Option:
    """One choice for one layer: its weight and input bits."""

    layer: str
    wbit: int
    abit: int


def share(kind: str, option: Option, layers: Mapping[str, LayerCost]) -> float:
    """Returns the share of one layer at one choice in a cost of the network."""
    c = layers[option.layer]
    if kind == "weight_bytes":
        return c.weights * option.wbit / 8
    if kind == "bops":
        return float(c.macs) * option.wbit * option.abit
    if kind == "mean_wbit":
        return c.weights * option.wbit / sum(x.weights for x in layers.values())
    return c.inputs * option.abit / sum(x.inputs for x in layers.values())


def spent(kind: str, wbits: Mapping[str, int], abits: Mapping[str, int], layers: Mapping[str, LayerCost]) -> float:
    """Returns a cost of the whole network at these widths (32 for layers without one)."""
    return sum(share(kind, Option(n, wbits.get(n, FLOAT), abits.get(n, FLOAT)), layers) for n in layers)


def limits(
    budget: Mapping[str, object],
    wbits: Mapping[str, int],
    abits: Mapping[str, int],
    layers: Mapping[str, LayerCost],
) -> dict[str, float]:
    """Returns each budget as a number.

    Args:
        budget: By kind: a number; `same`, the cost of the current plan; or a share of it, `75%`. None sets no limit.
        wbits, abits: Widths of the current plan.
        layers: Cost of each weighted layer.
    """
    out = {}
    for kind, asked in budget.items():
        if kind not in KINDS:
            raise QexpError(f"search.budget.{kind} is not allowed{near(kind, KINDS)}; use {', '.join(KINDS)}")
        if asked is None:
            continue
        now = spent(kind, wbits, abits, layers)
        out[kind] = now if asked == "same" else _number(kind, asked, now)
        if out[kind] <= 0:
            raise QexpError(f"search.budget.{kind}={asked!r} is not allowed; use a value above 0")
    if not out:
        raise QexpError(
            f"search.budget names no limit; give at least one of {', '.join(KINDS)}: a number, same, or 75%"
        )
    return out


def _number(kind: str, asked: object, now: float) -> float:
    text = str(asked).strip()
    try:
        return float(text.removesuffix("%")) / 100 * now if text.endswith("%") else float(text)
    except ValueError:
        raise QexpError(
            f"search.budget.{kind}={asked!r} is not allowed; use a number, same (the cost of the current widths), or a share such as 75%"
        ) from None


def least(kind: str, options: Sequence[Sequence[Option]], layers: Mapping[str, LayerCost]) -> float:
    """Returns the smallest cost of any choice."""
    return sum(min(share(kind, o, layers) for o in choices) for choices in options)
