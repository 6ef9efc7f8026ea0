"""Functions and methods that no layer computes."""

from __future__ import annotations

from qexp.integer.values import Value
from qexp.integer.walk import Walk
from qexp.network.graph import Step


def passed_call(walk: Walk, step: Step, where: str) -> Value:
    """An operation that does nothing in evaluation mode."""
    return walk.first(step)
