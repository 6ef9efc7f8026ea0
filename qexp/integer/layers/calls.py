"""Functions and methods that no layer computes."""

from __future__ import annotations

from dataclasses import replace

import torch

from qexp.integer.grids import cannot
from qexp.integer.layers.moves import repeated, reshaped, unbound
from qexp.integer.values import Value
from qexp.integer.walk import Walk
from qexp.network.graph import Step


def passed_call(walk: Walk, step: Step, where: str) -> Value:
    """An operation that does nothing in evaluation mode."""
    return walk.first(step)


def unbind_call(walk: Walk, step: Step, where: str) -> tuple[Value, ...]:
    """The entries along a dimension, as the queries, keys and values of attention are taken apart."""
    return unbound(walk, where, walk.first(step), step.argument(1, "dim", 0))


def expand_call(walk: Walk, step: Step, where: str) -> Value:
    """Entries of dimensions of size 1 repeated, as those of a gate before it is multiplied."""
    x = walk.integers(walk.first(step), where)
    if len(step.operands) > 1:
        sizes = walk.operand(step.operands[1], where).shape
    else:
        given = step.args[1:] or (step.kwargs["size"],)
        sizes = tuple(given[0] if isinstance(given[0], tuple | list) else given)[1:]
    if x.batch or x.lead or len(sizes) != len(x.shape):
        raise cannot(where, f"it expands {list(x.shape)} to {list(sizes)}", "expand dimensions of an image")
    for axis, (n, wanted) in enumerate(zip(x.shape, sizes)):
        if wanted not in (-1, n):
            x = repeated(walk, where, x, axis, wanted)
    return x


def reshape_as_call(walk: Walk, step: Step, where: str) -> Value:
    """The same elements in the shape of another tensor."""
    x, like = walk.integers(walk.first(step), where), walk.operand(step.operands[1], where)
    if x.batch or like.batch:
        raise cannot(where, "its shape mixes images of a batch", "keep the images in dimension 0: torch.flatten(x, 1)")
    return replace(reshaped(walk, where, x, like.shape), lead=like.lead)


def to_call(walk: Walk, step: Step, where: str) -> Value:
    """A conversion to float32 or float64, which hold the same numbers here."""
    for given in (*step.args[1:], *step.kwargs.values()):
        if isinstance(given, torch.dtype) and given not in (torch.float32, torch.float64):
            raise cannot(where, f"it converts to {given}, which rounds", "keep float32")
    return walk.first(step)
