"""Functions and methods that stand where a module could."""

from __future__ import annotations

import math

from torch import fx

from qexp.integer.grids import cannot
from qexp.integer.layers.activations import relu, relu6
from qexp.integer.layers.joins import flatten
from qexp.integer.lowering import Walk
from qexp.integer.values import Value


def flatten_call(walk: Walk, node: fx.Node, where: str) -> Value:
    """A flattening of everything but the batch."""
    x = walk.operand(node.args[0], where)
    start = node.args[1] if len(node.args) > 1 else node.kwargs.get("start_dim", 0)
    if start != 1 or len(node.args) > 2 or "end_dim" in node.kwargs:
        raise cannot(where, "it does not flatten everything but the batch", "use torch.flatten(x, 1)")
    return flatten(walk, node, where, None, x)


def view_call(walk: Walk, node: fx.Node, where: str) -> Value:
    """A view or reshape, which may only flatten."""
    x, sizes = walk.operand(node.args[0], where), node.args[1:]
    if len(sizes) != 2 or (sizes[1] != -1 and not isinstance(sizes[1], fx.Node) and sizes[1] != math.prod(x.shape)):
        raise cannot(where, "it is no flattening", "use torch.flatten(x, 1)")
    return flatten(walk, node, where, None, x)


def size_call(walk: Walk, node: fx.Node, where: str) -> Value:
    """The size of a tensor: read by a view alone, which ignores it."""
    return walk.operand(node.args[0], where)


def relu_call(walk: Walk, node: fx.Node, where: str) -> Value:
    """A ReLU."""
    return relu(walk, node, where, None, walk.operand(node.args[0], where))


def relu6_call(walk: Walk, node: fx.Node, where: str) -> Value:
    """A ReLU6."""
    return relu6(walk, node, where, None, walk.operand(node.args[0], where))


def passed_call(walk: Walk, node: fx.Node, where: str) -> Value:
    """What does nothing in evaluation."""
    return walk.operand(node.args[0], where)
