"""Functions and methods that are used in place of modules."""

from __future__ import annotations

import math

from qexp.integer.grids import cannot
from qexp.integer.layers.activations import relu, relu6
from qexp.integer.layers.joins import flatten
from qexp.integer.values import Value
from qexp.integer.walk import Walk
from qexp.network.graph import PerImage, Step


def flatten_call(walk: Walk, step: Step, where: str) -> Value:
    """A flattening of everything but the batch."""
    x = walk.first(step)
    start, end = step.argument(1, "start_dim", 0), step.argument(2, "end_dim", -1)
    if start != 1 or end not in (-1, len(x.shape)):
        raise cannot(where, "it does not flatten everything but the batch", "use torch.flatten(x, 1)")
    return flatten(walk, step, where, None, x)


def view_call(walk: Walk, step: Step, where: str) -> Value:
    """A view or reshape, which may only flatten."""
    x, sizes = walk.first(step), step.args[1:] or tuple(step.kwargs.values())
    if len(sizes) == 1 and isinstance(sizes[0], tuple | list):
        sizes = sizes[0]
    images = sizes[0] if sizes else None
    every = images == -1 or (isinstance(images, PerImage) and images == PerImage(0, 1))
    if len(sizes) != 2 or not every or sizes[1] not in (-1, math.prod(x.shape)) or sizes[0] == sizes[1] == -1:
        raise cannot(where, "it is no flattening", "use torch.flatten(x, 1)")
    return flatten(walk, step, where, None, x)


def relu_call(walk: Walk, step: Step, where: str) -> Value:
    """A ReLU."""
    return relu(walk, step, where, None, walk.first(step))


def relu6_call(walk: Walk, step: Step, where: str) -> Value:
    """A ReLU6."""
    return relu6(walk, step, where, None, walk.first(step))


def passed_call(walk: Walk, step: Step, where: str) -> Value:
    """An operation that does nothing in evaluation mode."""
    return walk.first(step)
