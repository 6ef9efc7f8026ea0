"""Turns a quantized network into its integer program: reads the graph in order and gives each tensor its integers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from qexp.errors import QexpError
from qexp.integer.grids import CannotLowerError, cannot, together
from qexp.integer.layers import ANYWHERE, FUNCTIONS, LAYERS, MOVING
from qexp.integer.lowered import Lowered
from qexp.integer.walk import Walk
from qexp.layers.calls import all_calls
from qexp.layers.swap import evaluating, quantizers_off
from qexp.models.modules import StridedPad
from qexp.network.graph import Graph, Ref, Step
from qexp.network.recorder import record, several


@torch.no_grad()
def lower(model: nn.Module, example: Tensor, about: dict[str, Any] | None = None, as_runtimes: bool = False) -> Lowered:
    """Returns the integer program of a quantized, calibrated classifier; the model stays unchanged.

    Args:
        model: Network whose activations and weights carry quantizers.
        example: Images `[N, C, H, W]`, for the shapes.
        about: Description of the origin, written into the program.
        as_runtimes: Requantize results of layers in float32, as 8-bit runtimes do (`deploy=int8`); by default more exactly.

    Raises:
        QexpError: Parts of the network have no integer form; the message names each layer, the reason and the remedy.
    """
    with all_calls(model):
        seen = record(model, example, leaves=(StridedPad,))
    if seen.graph is None:
        raise cannot(
            type(model).__name__, f"its graph is not known ({seen.error})", "write it without data-dependent steps"
        )
    one_scale: set[str] = set()
    while True:
        walk = Walk(model, example, LAYERS, FUNCTIONS, as_runtimes, ANYWHERE, MOVING, one_scale)
        refusals = _visit(walk, seen.graph)
        more = {refusal.mends for refusal in refusals if refusal.mends} - one_scale
        if not more:
            break
        # Every reader of such a result must see it rounded, also those before the one that needs that.
        one_scale |= more
    if refusals:
        raise together(refusals)
    walk.lowered.program.about = dict(about or {})
    return walk.lowered


def _visit(walk: Walk, graph: Graph) -> list[CannotLowerError]:
    """Writes the operations of all steps; returns what has no integer form."""
    refusals: list[CannotLowerError] = []
    shapes: dict[Step, list[tuple[int, ...]]] = {}
    for step in _needed(graph):
        try:
            if step.depends:
                walk.visit(step)
            else:
                walk.constant(step)
        except QexpError as error:
            if isinstance(error, CannotLowerError):
                refusals.append(error)
            elif not refusals:  # else it may come of the codes that a refused step was given
                raise QexpError(f"{step.name}: {error}") from error
            shapes = shapes or _shapes(walk.model, graph, walk.example)
            walk.assume(step, shapes.get(step, []))
    return refusals


def _needed(graph: Graph) -> list[Step]:
    """Returns the steps on which the result depends: attention returns its shares too, which few networks read."""
    needed = {graph.output, *graph.inputs}
    for step in reversed(graph.steps):
        if step in needed:  # a tensor that another step wrote into is a result of that step
            needed.update(step.sources)
            needed.update(leaf.step for leaf in step.changed if isinstance(leaf, Ref))
    return [step for step in graph.steps if step in needed]


def _shapes(model: nn.Module, graph: Graph, example: Tensor) -> dict[Step, list[tuple[int, ...]]]:
    """Returns the shapes of the tensors that each step makes, without the batch."""
    shapes: dict[Step, list[tuple[int, ...]]] = {}

    def keep(step: Step, made: list[Tensor]) -> None:
        shapes[step] = [tuple(tensor.shape[1:]) for tensor in made]

    with all_calls(model), evaluating(model), quantizers_off(model):
        graph.replay(several(example), keep=keep)
    return shapes
