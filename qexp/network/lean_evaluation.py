"""Evaluation with fewer passes over memory, to the same numbers.

A ReLU whose result goes into quantizers alone, each of which clips at zero anyway, is left out: the quantizer's clamp does it. Other ReLUs
and residual adds write over their operand where nobody else reads it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from qexp.layers.quantized import WEIGHTED, QuantAdd, QuantBatchNorm2d, Quantized, Unweighted, float_class
from qexp.models.modules import Add
from qexp.network.facts import RELUS, trace
from qexp.quantizers.base import Quantizer

# a maximum, a copy or another shape commutes with a ReLU
_COMMUTES = (nn.Identity, nn.Dropout, nn.Flatten, nn.MaxPool2d)
_COMMUTING_FUNCTIONS = {torch.flatten, torch.reshape}
_COMMUTING_METHODS = {"flatten", "view", "reshape", "contiguous"}
# layers that read nothing of their input but what its quantizer returns (XNOR layers, say, read its magnitude too)
_READ_QUANTIZED = {Quantized.forward, Unweighted.forward, QuantAdd.forward, QuantBatchNorm2d.forward}
_FRESH = (*WEIGHTED, _BatchNorm, Add)  # their result is a new tensor that they do not keep
_FAR = 1e30  # beyond any range


@dataclass(frozen=True)
class Spared:
    """What an evaluation can do without.

    Attributes:
        absorbed: ReLUs that the quantizers after them make redundant.
        in_place: ReLUs and adds whose (first) operand nobody else reads.
    """

    absorbed: tuple[str, ...] = ()
    in_place: tuple[str, ...] = ()


@contextmanager
def lean(model: nn.Module) -> Iterator[Spared]:
    """Inside, the model in evaluation mode computes the same values in fewer passes over memory; not for gradients.

    Where the model cannot be traced nothing changes. Yields what was spared.
    """
    spared = find_spared(model)
    absorbed = [model.get_submodule(name) for name in spared.absorbed]
    in_place = [model.get_submodule(name) for name in spared.in_place]
    before = [vars(module).get("inplace") for module in in_place]  # None: that of the class
    for module in absorbed:
        module.forward = _without_relu(module)
    for module in in_place:
        module.inplace = True
    try:
        yield spared
    finally:
        for module in absorbed:
            del module.forward
        for module, inplace in zip(in_place, before):
            if inplace is None:  # nothing may stay behind: what a module is set to enters the hash of kept statistics
                del module.inplace
            else:
                module.inplace = inplace


def _without_relu(module: nn.Module) -> Callable[[Tensor], Tensor]:
    if isinstance(module, Quantized):
        return lambda x: module.output_quantizer(module.input_quantizer(x))
    return lambda x: x


def find_spared(model: nn.Module) -> Spared:
    """Returns what an evaluation of the model, its quantizers calibrated, can do without."""
    graph, _ = trace(model)
    if graph is None:
        return Spared()
    calls: dict[str, list[fx.Node]] = {}
    for node in graph.nodes:
        if node.op == "call_module":
            calls.setdefault(node.target, []).append(node)
    absorbed, in_place = [], []
    for name, nodes in calls.items():
        module = model.get_submodule(name)
        relu = issubclass(float_class(module), RELUS)
        if module._forward_hooks or module._forward_pre_hooks:
            continue
        if relu and all(_is_absorbed(node, model, module) for node in nodes):
            absorbed.append(name)
        elif (relu or issubclass(float_class(module), Add)) and all(_owns(node, model) for node in nodes):
            in_place.append(name)
    return Spared(tuple(absorbed), tuple(in_place))


def _owns(node: fx.Node, model: nn.Module) -> bool:
    """Whether nobody but this node reads its first operand, a new tensor."""
    value = node.args[0] if node.args else None
    if not isinstance(value, fx.Node) or value.op != "call_module" or list(value.users) != [node]:
        return False
    producer = model.get_submodule(value.target)
    if producer._forward_hooks:  # who looks at the result may keep it
        return False
    if type(producer) is nn.Identity:
        return _owns(value, model)
    return issubclass(float_class(producer), _FRESH)


def _is_absorbed(node: fx.Node, model: nn.Module, relu: nn.Module) -> bool:
    act = nn.functional.relu6 if issubclass(float_class(relu), nn.ReLU6) else torch.relu
    if isinstance(relu, Quantized) and isinstance(relu.output_quantizer, Quantizer):
        return relu.enabled and clips(relu.output_quantizer, act)
    return _all_clip(node, model, act)


def _all_clip(node: fx.Node, model: nn.Module, act: Callable[[Tensor], Tensor]) -> bool:
    """Whether everything that uses a node's result quantizes it first, by quantizers that clip as `act` does."""
    return bool(node.users) and all(_clips_there(user, node, model, act) for user in node.users)


def _clips_there(user: fx.Node, node: fx.Node, model: nn.Module, act: Callable[[Tensor], Tensor]) -> bool:
    if node in user.kwargs.values():
        return False
    if (user.op == "call_function" and user.target in _COMMUTING_FUNCTIONS) or (
        user.op == "call_method" and user.target in _COMMUTING_METHODS
    ):
        return _all_clip(user, model, act)
    if user.op != "call_module":
        return False
    layer = model.get_submodule(user.target)
    if layer._forward_pre_hooks or layer._forward_hooks:
        return False
    if type(layer) in _COMMUTES:
        return _all_clip(user, model, act)
    if not isinstance(layer, Quantized) or not layer.enabled or type(layer).forward not in _READ_QUANTIZED:
        return False
    inputs = [site for site in layer.sites if site.startswith("input")]
    taken = [layer.site(site) for site, arg in zip(inputs, user.args) if arg is node]
    return len(inputs) == len(user.args) and all(isinstance(q, Quantizer) and clips(q, act) for q in taken)


@torch.no_grad()
def clips(quantizer: Quantizer, act: Callable[[Tensor], Tensor]) -> bool:
    """Whether the quantizer gives the same value with and without `act` (ReLU or ReLU6) before it, for every number.

    A monotone quantizer that returns the same at an end of the number line as at the nearer end of what `act` passes does so everywhere
    between. Numbers of many magnitudes tell whether its values depend on the rest of the tensor.
    """
    if "monotone" not in quantizer.properties or not bool(quantizer.ready):
        return False
    shape = (2, *quantizer.shape[1:]) if len(quantizer.shape) > 1 else (256,)
    generator = torch.Generator().manual_seed(0)
    many = torch.randn(shape, generator=generator) * torch.exp(3 * torch.randn(shape, generator=generator))
    probes = (torch.full(shape, -_FAR), torch.full(shape, _FAR), many)
    return all(torch.equal(quantizer(x), quantizer(act(x))) for x in (p.to(quantizer.ready.device) for p in probes))
