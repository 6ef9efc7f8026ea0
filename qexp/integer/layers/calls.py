"""Functions and methods that no layer computes."""

from __future__ import annotations

from qexp.integer.layers.moves import unbound
from qexp.integer.values import Value
from qexp.integer.walk import Walk
from qexp.network.graph import Step


def passed_call(walk: Walk, step: Step, where: str) -> Value:
    """An operation that does nothing in evaluation mode."""
    return walk.first(step)


def unbind_call(walk: Walk, step: Step, where: str) -> tuple[Value, ...]:
    """The entries along a dimension, as the queries, keys and values of attention are taken apart."""
    return unbound(walk, where, walk.first(step), step.argument(1, "dim", 0))
