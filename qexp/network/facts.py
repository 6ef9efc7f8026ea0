"""Facts read off the model: what runs in which order, on which shapes, and what follows what.

The order and the shapes come from running the model once; conv-BN pairs, layers followed by a ReLU and the sources of each layer's
input come from a torch.fx trace of an eval-mode copy. The trace is only read. Where it fails (detectors, data-dependent control flow)
the facts say so and hold what running alone tells.
"""

from __future__ import annotations

import copy
import logging
from dataclasses import dataclass, field

import torch
from torch import Tensor, fx, nn

from qexp.errors import QexpError
from qexp.layers.quantized import GRADIENT, QUANTIZED, WEIGHTED, float_class, main, operands
from qexp.layers.swap import evaluating, quantizers_off
from qexp.models.modules import Add, Concat
from qexp.network.unreachable_weights import stray_weights

log = logging.getLogger(__name__)

RELUS = (nn.ReLU, nn.ReLU6)
_RELU_FUNCTIONS = (torch.relu, torch.relu_, torch.nn.functional.relu, torch.nn.functional.relu6)
_RELU_METHODS = ("relu", "relu_")
# what passes a tensor on without new values: a tensor quantized before these is still on its grid after them
_SAME_VALUES = (nn.Identity, nn.Dropout, nn.Flatten, nn.MaxPool2d, nn.ReLU)
_SAME_VALUES_FUNCTIONS = {
    torch.flatten,
    torch.reshape,
    torch.nn.functional.relu,
    torch.relu,
    torch.relu_,
    torch.nn.functional.dropout,
}
_SAME_VALUES_METHODS = {"flatten", "view", "reshape", "contiguous", "relu", "relu_"}
# what treats each channel by itself, so that a channel can be followed from one weighted layer to the next
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
    """What `facts` found.

    Attributes:
        order: Layers that can carry quantizers, in order of execution, each once.
        shapes: Of each layer's sites, `[N, ...]` with the batch of the example: `shapes["conv1"]["input"]`; where a layer is called more
            than once, those of its first call.
        every_call: The same for each call of a layer, in order: `every_call["conv1"][0]` is `shapes["conv1"]`.
        first, last: The first weighted layer and the last one, by execution.
        bn_of: Batch norm that directly follows a convolution and has no other source.
        followed_by_relu: Layers (and batch norms) whose result goes into a ReLU and nowhere else.
        rectified: Layers whose input is a layer's result, unchanged in value but for a ReLU on the way.
        sources: For each layer, the layers whose results reach its inputs unchanged in value, one tuple an operand.
        chains: For a weighted layer whose whole result goes, channel by channel, into one other weighted layer: what it passes on the way
            (names of modules; functions with `()`), and that layer last. A branch, or a layer called twice, has none.
        calls: How often each module is called.
        strays: Who computes with weights that cannot carry quantizers, by name and type.
        trace_error: Why the model could not be traced; empty if it was.
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
    chains: dict[str, tuple[str, ...]] = field(default_factory=dict)
    calls: dict[str, int] = field(default_factory=dict)
    strays: tuple[str, ...] = ()
    trace_error: str = ""

    def consumers(self, layer: str) -> list[str]:
        """Returns the layers that take this layer's result as it is."""
        return [name for name, operands in self.sources.items() if any(layer in operand for operand in operands)]


def facts(model: nn.Module, example: Tensor) -> Facts:
    """Returns what the model's structure says, for an example input `[N, C, H, W]`; the model is left as it was."""
    calls = _run(model, example)
    order, shapes = tuple(calls), {name: found[0] for name, found in calls.items()}
    weighted = [name for name in order if issubclass(float_class(model.get_submodule(name)), WEIGHTED)]
    if not weighted:
        raise QexpError(f"{type(model).__name__} runs no convolution or linear layer: there is nothing to quantize")
    traced, error = trace(model)
    if error:
        log.info("the model cannot be traced: %s", error)
    found = _read(traced, model) if traced is not None else {}
    strays = stray_weights(model, example)
    ends = weighted[0], weighted[-1]
    return Facts(order, shapes, *ends, every_call=calls, strays=strays, trace_error=error, **found)


@torch.no_grad()
def _run(model: nn.Module, example: Tensor) -> dict[str, tuple[dict[str, tuple[int, ...]], ...]]:
    """Returns the shapes of each call of the layers, in the order of their first calls."""
    calls: dict[str, tuple[dict[str, tuple[int, ...]], ...]] = {}

    def hook(name: str):
        def seen(module, args, kwargs, output):
            sites, tensors, output = {}, operands(args, kwargs), main(output)
            for i, x in enumerate(tensors):
                sites["input" if len(tensors) == 1 else f"input.{i}"] = tuple(x.shape)
            if isinstance(output, Tensor):
                sites["output"] = tuple(output.shape)
                if issubclass(float_class(module), WEIGHTED):
                    sites[GRADIENT] = tuple(output.shape)
            for site in ("weight", "bias", "running_mean", "running_var"):
                tensor = getattr(module, site, None)
                if isinstance(tensor, Tensor):
                    sites[site] = tuple(tensor.shape)
            calls[name] = (*calls.get(name, ()), sites)

        return seen

    handles = [
        m.register_forward_hook(hook(n), with_kwargs=True)
        for n, m in model.named_modules()
        if float_class(m) in QUANTIZED
    ]
    try:
        with evaluating(model), quantizers_off(model):
            model(example)
    finally:
        for handle in handles:
            handle.remove()
    return calls


class Tracer(fx.Tracer):
    """Traces down to the layers that can carry quantizers, adds, concatenations and what torch brings along."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        if float_class(m) in QUANTIZED or isinstance(m, Add | Concat):
            return True
        return m.__module__.startswith("torch.nn") and not isinstance(m, nn.Sequential)


def trace(model: nn.Module) -> tuple[fx.Graph | None, str]:
    """Returns the graph in evaluation mode, layers that can carry quantizers being its leaves; or None and why there is none.

    What is traced is a copy of the modules on the way to the leaves, and of their buffers: a forward may set and change them. Leaves are
    not entered, so that they and their quantizers need no copying, and weights stand in the graph by name.
    """
    try:
        with evaluating(model):
            tracer = Tracer()
            leaves = [
                m for name, m in model.named_modules() if name and tracer.is_leaf_module(m, name) and _computes(m)
            ]
            shared = {id(kept): kept for kept in (*leaves, *model.parameters())}
            return tracer.trace(copy.deepcopy(model, shared)), ""
    except Exception as error:  # whatever a foreign model's forward raises while being traced
        return None, f"{type(error).__name__}: {error}".splitlines()[0]


def _computes(module: nn.Module) -> bool:
    """Whether a module can be called; `ModuleList` and the like only hold others."""
    return type(module).forward is not nn.Module.forward


def _read(graph: fx.Graph, model: nn.Module) -> dict:
    def layer(node: fx.Node) -> nn.Module | None:
        return model.get_submodule(node.target) if node.op == "call_module" else None

    def kind(node: fx.Node) -> type:
        module = layer(node)
        return float_class(module) if module is not None else type(None)

    def is_relu(node: fx.Node) -> bool:
        return (
            issubclass(kind(node), RELUS)
            or (node.op == "call_function" and node.target in _RELU_FUNCTIONS)
            or (node.op == "call_method" and node.target in _RELU_METHODS)
        )

    def reaches(node: fx.Node) -> tuple[tuple[str, ...], bool]:
        """Names of the modules, from the nearest back, whose result this node passes on unchanged; and whether a ReLU is on the way."""
        names: list[str] = []
        rectifies = False
        while isinstance(node, fx.Node):
            rectifies |= is_relu(node)
            if node.op == "call_module":
                names.append(node.target)
                if not issubclass(kind(node), _SAME_VALUES):
                    break
            elif not (
                (node.op == "call_function" and node.target in _SAME_VALUES_FUNCTIONS)
                or (node.op == "call_method" and node.target in _SAME_VALUES_METHODS)
            ):
                break
            node = node.args[0]
        return tuple(names), rectifies

    def users(node: fx.Node) -> list[fx.Node]:
        """The nodes that use the result, looking through modules that do nothing."""
        out: list[fx.Node] = []
        for user in node.users:
            out.extend(users(user) if issubclass(kind(user), nn.Identity) else [user])
        return out

    def chain(node: fx.Node) -> tuple[str, ...]:
        """What the result passes, channel by channel and without a branch, up to and with the next weighted layer; () if there is none."""
        passed: list[str] = []
        while len(node.users) == 1:
            before, node = node, next(iter(node.users))
            if not node.args or node.args[0] is not before:
                return ()
            if node.op == "call_module":
                passed.append(node.target)
                if issubclass(kind(node), WEIGHTED):
                    return tuple(passed) if calls[node.target] == 1 else ()
                known = issubclass(kind(node), _CHANNELWISE)
            else:
                function = getattr(node.target, "__name__", node.target)
                passed.append(f"{function}()")
                known = node.op in ("call_function", "call_method") and function in _CHANNELWISE_NAMES
            if not known:
                return ()
        return ()

    bn_of, sources, chains = {}, {}, {}
    rectified: set[str] = set()
    relu_after: dict[str, bool] = {}  # after every call
    calls: dict[str, int] = {}
    for node in graph.nodes:
        if node.op == "call_module":
            calls[node.target] = calls.get(node.target, 0) + 1
    for node in graph.nodes:
        if node.op != "call_module":
            continue
        after = users(node)
        straight = bool(after) and all(is_relu(user) for user in after)
        relu_after[node.target] = straight and relu_after.get(node.target, True)
        if (
            issubclass(kind(node), nn.modules.conv._ConvNd)
            and len(after) == 1
            and issubclass(kind(after[0]), nn.modules.batchnorm._BatchNorm)
            and calls[node.target] == calls[after[0].target] == 1
        ):
            bn_of[node.target] = after[0].target
        if issubclass(kind(node), WEIGHTED) and calls[node.target] == 1 and (found := chain(node)):
            chains[node.target] = found
        if kind(node) in QUANTIZED:
            operands = [reaches(arg) for arg in node.args if isinstance(arg, fx.Node)]
            sources.setdefault(node.target, tuple(names for names, _ in operands))
            if len(operands) == 1 and operands[0][1]:
                rectified.add(node.target)
    return {
        "bn_of": bn_of,
        "followed_by_relu": frozenset(name for name, straight in relu_after.items() if straight),
        "rectified": frozenset(rectified),
        "sources": sources,
        "chains": chains,
        "calls": calls,
    }
