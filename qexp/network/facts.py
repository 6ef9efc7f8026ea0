"""Facts about a model's structure: the order of its layers, their shapes, and which layer feeds which.

All facts come from a recorded run (`qexp.network.recorder`). The order and the shapes come from the run itself. Conv-BN pairs, layers
followed by a ReLU, and the sources of each layer's input come from the graph. Where there is no graph (detectors, data-dependent control
flow), the facts hold the reason, the order and the shapes.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field

from torch import Tensor, nn

from qexp.errors import QexpError
from qexp.layers.calls import calls
from qexp.layers.quantized import QUANTIZED, WEIGHTED, float_class
from qexp.models import modules, operations
from qexp.network.graph import Graph, Ref, Step
from qexp.network.recorder import Recording, Shapes
from qexp.network.stand_ins import recorded

log = logging.getLogger(__name__)

RELUS = (nn.ReLU, nn.ReLU6)
_RELU_NAMES = {"relu", "relu_", "relu6"}
# operations that create no new values: a tensor quantized before them is still on its grid after them
_SAME_VALUES = (nn.Identity, nn.Dropout, nn.Flatten, nn.MaxPool2d, nn.ReLU)
_SAME_VALUES_NAMES = {"flatten", "reshape", "view", "contiguous", "relu", "relu_", "dropout"}
# operations that move values to other places, or put tensors side by side
_MOVED = (modules.Concat, nn.PixelShuffle, nn.PixelUnshuffle, nn.ChannelShuffle, nn.Unflatten, operations.Stack)
_MOVED += (operations.Split, operations.Index, operations.Permute, operations.Transpose, operations.Reshape)
_MOVED += (operations.Roll,)
_MOVED_NAMES = {
    *("split", "chunk", "unbind", "getitem", "cat", "stack", "permute", "transpose", "expand", "expand_as"),
    *("pixel_shuffle", "pixel_unshuffle", "channel_shuffle", "unflatten", "squeeze", "unsqueeze", "roll"),
}
# operations that keep channels separate, so that a channel can be followed from one weighted layer to the next
_CHANNELWISE = (
    *(
        nn.Identity,
        nn.Dropout,
        nn.Dropout2d,
        nn.ReLU,
        nn.ReLU6,
        nn.LeakyReLU,
        nn.PReLU,
        nn.SiLU,
        nn.Hardswish,
        nn.Flatten,
    ),
    *(nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.modules.batchnorm._BatchNorm),
)
_CHANNELWISE_NAMES = {
    *("relu", "relu_", "relu6", "leaky_relu", "prelu", "silu", "hardswish", "dropout", "dropout2d", "flatten"),
    *("max_pool2d", "avg_pool2d", "adaptive_avg_pool2d", "contiguous"),
}


@dataclass(frozen=True)
class Facts:
    """Holds the structure of a network, as `facts` returns it.

    Attributes:
        order: Layers that can carry quantizers, in order of execution, each once.
        shapes: Shapes of each layer's sites, `[N, ...]` for a batch of `images`: `shapes["conv1"]["input"]`. Where a layer is called
            more than once, these are the shapes of its first call.
        every_call: The same for each call of a layer, in order: `every_call["conv1"][0]` is `shapes["conv1"]`.
        first, last: The first weighted layer and the last one, by execution.
        bn_of: For each convolution, the batch norm that directly follows it and has no other source.
        followed_by_relu: Layers (and batch norms) whose result goes into a ReLU and nowhere else.
        rectified: Layers whose input is another layer's result after a ReLU, otherwise unchanged in value.
        sources: For each layer, the layers whose results reach its inputs unchanged in value, one tuple per operand.
        reached: The same, where values may also have moved to other places: parts of a result, or results side by side.
        chains: For a weighted layer whose whole result goes, channel by channel, into one other weighted layer: the steps between them
            (names of modules; functions with `()`), and that layer last. A layer that branches, or is called twice, has no chain.
        calls: How often each module is called.
        strays: Layers (name and type) whose weights are used but cannot be quantized.
        products: Multiply-accumulates per image outside the layers of known types, by name: those of `strays`, and products of
            activations or with fixed filters, by module and function.
        images: Batch size of the shapes.
        trace_error: Why the network has no graph; empty if it has one.
    """

    order: tuple[str, ...]
    shapes: dict[str, dict[str, tuple[int, ...]]]
    first: str
    last: str
    every_call: dict[str, tuple[dict[str, tuple[int, ...]], ...]] = field(default_factory=dict)
    bn_of: dict[str, str] = field(default_factory=dict)
    followed_by_relu: frozenset[str] = frozenset()
    rectified: frozenset[str] = frozenset()
    sources: dict[str, tuple[tuple[str, ...], ...]] = field(default_factory=dict)
    reached: dict[str, tuple[tuple[str, ...], ...]] = field(default_factory=dict)
    chains: dict[str, tuple[str, ...]] = field(default_factory=dict)
    calls: dict[str, int] = field(default_factory=dict)
    strays: tuple[str, ...] = ()
    products: dict[str, int] = field(default_factory=dict)
    images: int = 1
    trace_error: str = ""

    def consumers(self, layer: str) -> list[str]:
        """Returns the layers whose input is this layer's unchanged result."""
        return [name for name, operands in self.sources.items() if any(layer in operand for operand in operands)]


def facts(model: nn.Module, example: Tensor) -> Facts:
    """Returns the structure of the model, found by running an example input `[N, C, H, W]`.

    The model computes the same afterwards; function calls that could carry quantizers have stand-ins, which are layers like any others.
    """
    seen = recorded(model, example)
    every_call = _without_decoding(model, seen)
    order, shapes = tuple(every_call), {name: found[0] for name, found in every_call.items()}
    weighted = [name for name in order if issubclass(float_class(model.get_submodule(name)), WEIGHTED)]
    if not weighted and not seen.products.strays:
        raise QexpError(f"{type(model).__name__} runs no convolution or linear layer, so there is nothing to quantize")
    if seen.error:
        log.info("the model has no graph: %s", seen.error)
    found = _read(seen.graph, model) if seen.graph is not None else {}
    products = {name: macs // seen.images for name, macs in (seen.products.strays | seen.products.others).items()}
    return Facts(
        order,
        shapes,
        *((weighted[0], weighted[-1]) if weighted else ("", "")),
        every_call=every_call,
        strays=tuple(seen.products.strays),
        products=products,
        images=seen.images,
        trace_error=seen.error,
        **found,
    )


def _without_decoding(model: nn.Module, seen: Recording) -> dict[str, tuple[Shapes, ...]]:
    """Returns the shapes of all layers except function calls behind the last weights of a network with several results.

    These decode boxes and the like, which are no sums of a network's layers.
    """
    if seen.graph is not None and isinstance(seen.graph.output.args[0], Ref):
        return seen.shapes
    called = {f"{name}.{local}" if name else local for name, m in model.named_modules() for local in calls(m)}
    return {name: found for name, found in seen.shapes.items() if name not in called or name in seen.before_weights}


def _read(graph: Graph, model: nn.Module) -> dict:
    def kind(step: Step) -> type:
        return float_class(model.get_submodule(step.module)) if step.op == "module" else type(None)

    def is_relu(step: Step) -> bool:
        return issubclass(kind(step), RELUS) or step.function in _RELU_NAMES

    def reaches(step: Step, index: int) -> tuple[tuple[str, ...], bool]:
        """Returns the modules (nearest first) whose result this step passes on unchanged, and whether a ReLU lies between."""
        names: list[str] = []
        rectifies = False
        while step.op in ("module", "function") and index == 0:
            rectifies |= is_relu(step)
            if step.op == "module":
                names.append(step.module)
                if not issubclass(kind(step), _SAME_VALUES):
                    break
            elif step.function not in _SAME_VALUES_NAMES:
                break
            if not step.operands:
                break
            step, index = step.operands[0].step, step.operands[0].index
        return tuple(names), rectifies

    def moved(step: Step) -> tuple[str, ...]:
        """Returns the modules whose results this step passes on, at the same places or at others."""
        own = (step.module,) if step.op == "module" else ()
        known = issubclass(kind(step), _SAME_VALUES + _MOVED) or step.function in _SAME_VALUES_NAMES | _MOVED_NAMES
        if not known or step.op not in ("module", "function"):
            return own
        if step not in origins:
            origins[step] = tuple(dict.fromkeys((*own, *(name for ref in step.operands for name in moved(ref.step)))))
        return origins[step]

    def users(step: Step) -> list[Step]:
        """Returns the steps that use the result, skipping modules that do nothing."""
        out: list[Step] = []
        for user in step.users:
            out.extend(users(user) if issubclass(kind(user), nn.Identity) else [user])
        return out

    def chain(step: Step) -> tuple[str, ...]:
        """Returns the steps after this one up to the next weighted layer, that layer included; () if channels mix or the path branches."""
        passed: list[str] = []
        while len(step.users) == 1:
            before, step = step, step.users[0]
            if not step.operands or step.operands[0].step is not before or len(step.operands) > 1:
                return ()
            if step.op == "module":
                passed.append(step.module)
                if issubclass(kind(step), WEIGHTED):
                    return tuple(passed) if calls[step.module] == 1 else ()
                known = issubclass(kind(step), _CHANNELWISE)
            else:
                passed.append(f"{step.function}()")
                known = step.function in _CHANNELWISE_NAMES
            if not known:
                return ()
        return ()

    bn_of, sources, reached, chains = {}, {}, {}, {}
    origins: dict[Step, tuple[str, ...]] = {}
    rectified: set[str] = set()
    relu_after: dict[str, bool] = {}  # after every call
    calls: dict[str, int] = {}
    for step in graph.steps:
        if step.op == "module":
            calls[step.module] = calls.get(step.module, 0) + 1
    for step in graph.steps:
        if step.op != "module":
            continue
        after = users(step)
        straight = bool(after) and all(is_relu(user) for user in after)
        relu_after[step.module] = straight and relu_after.get(step.module, True)
        if (
            issubclass(kind(step), nn.modules.conv._ConvNd)
            and len(after) == 1
            and issubclass(kind(after[0]), nn.modules.batchnorm._BatchNorm)
            and calls[step.module] == calls[after[0].module] == 1
        ):
            bn_of[step.module] = after[0].module
        if issubclass(kind(step), WEIGHTED) and calls[step.module] == 1 and (found := chain(step)):
            chains[step.module] = found
        if kind(step) in QUANTIZED:
            operands = [reaches(ref.step, ref.index) for ref in step.operands]
            sources.setdefault(step.module, tuple(names for names, _ in operands))
            reached.setdefault(step.module, tuple(moved(ref.step) for ref in step.operands))
            if len(operands) == 1 and operands[0][1]:
                rectified.add(step.module)
    return {
        "bn_of": bn_of,
        "followed_by_relu": frozenset(name for name, straight in relu_after.items() if straight),
        "rectified": frozenset(rectified),
        "sources": sources,
        "reached": reached,
        "chains": chains,
        "calls": calls,
    }
