"""Evaluation with fewer passes over memory and the same results.

A ReLU is skipped where its result goes only into quantizers that clip at zero: their clamp has the same effect. Other ReLUs and residual
adds overwrite their operand where no other step reads it. The recorded graph holds the readers of each tensor; readers of a tensor that a
ReLU overwrote read the ReLU's result. The first batch is computed both ways, and the results must be equal to the bit.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from qexp.layers.quantized import WEIGHTED, QuantAdd, QuantBatchNorm2d, Quantized, Unweighted, float_class
from qexp.models.modules import Add
from qexp.network.facts import RELUS
from qexp.network.graph import Step, mapped, same
from qexp.network.recorder import record
from qexp.quantizers.base import Quantizer

log = logging.getLogger(__name__)

# a maximum, a copy and a reshape commute with a ReLU
_COMMUTES = (nn.Identity, nn.Dropout, nn.Flatten, nn.MaxPool2d)
_COMMUTING_FUNCTIONS = {"flatten", "view", "reshape", "contiguous"}
# layers that read only the quantized input (XNOR layers, for example, also read the magnitude of the float input)
_READ_QUANTIZED = {Quantized.forward, Unweighted.forward, QuantAdd.forward, QuantBatchNorm2d.forward}
_FRESH = (*WEIGHTED, _BatchNorm, Add)  # their result is a new tensor that they do not keep
_FAR = 1e30  # beyond any range


@dataclass(frozen=True)
class Spared:
    """The layers that an evaluation can skip or run in place.

    Attributes:
        absorbed: ReLUs that are redundant because of the quantizers after them.
        in_place: ReLUs and adds whose (first) operand no other step reads.
    """

    absorbed: tuple[str, ...] = ()
    in_place: tuple[str, ...] = ()


@contextmanager
def lean(model: nn.Module, example: Tensor) -> Iterator[Spared]:
    """Makes the model compute the same values in fewer passes over memory inside a `with` block; not for gradients.

    The model must be in evaluation mode. Where it has no graph, nothing changes. The first batch is also computed in all passes. Where
    the results differ in a bit, a warning names the layers, and all passes are computed from then on. Yields the spared layers.

    Args:
        model: The network with calibrated quantizers.
        example: Images `[N, ...]` to record the graph with.
    """
    spared = find_spared(model, example)
    if not (spared.absorbed or spared.in_place):
        yield spared
        return
    rewrite = _Rewrite(model, spared)
    first = _FirstBatch(model, rewrite)
    try:
        rewrite.on()
        first.watch()
        yield spared
    finally:
        first.done()
        rewrite.off()


class _Rewrite:
    """Switches the spared layers on and off, all together or one by one."""

    def __init__(self, model: nn.Module, spared: Spared) -> None:
        self.absorbed = {name: model.get_submodule(name) for name in spared.absorbed}
        self.in_place = {name: model.get_submodule(name) for name in spared.in_place}
        self._before: list[tuple[nn.Module, bool | None]] = []

    def on(self, only: str | None = None) -> None:
        """Skips ReLUs and writes in place, for the layer `only` or for all layers."""
        for name, module in self.absorbed.items():
            if only in (None, name):
                module.forward = _without_relu(module)
        for name, module in self.in_place.items():
            if only in (None, name):
                self._before.append((module, vars(module).get("inplace")))  # None: the attribute is the class's
                module.inplace = True

    def off(self) -> None:
        """Restores every module."""
        for module in self.absorbed.values():
            vars(module).pop("forward", None)
        while self._before:
            module, inplace = self._before.pop()
            if inplace is None:  # restore exactly: module attributes enter the hash of cached statistics
                del module.inplace
            else:
                module.inplace = inplace


class _FirstBatch:
    """Computes the first batch also in all passes, and compares the results."""

    def __init__(self, model: nn.Module, rewrite: _Rewrite) -> None:
        self.model, self.rewrite = model, rewrite
        self._handles: list[Any] = []
        self._given: tuple = ()
        self._random: Tensor | None = None

    def watch(self) -> None:
        """Registers the hooks that compare the first batch."""
        self._handles = [
            self.model.register_forward_pre_hook(self._before, with_kwargs=True),
            self.model.register_forward_hook(self._after, with_kwargs=True),
        ]

    def done(self) -> None:
        """Removes the hooks."""
        while self._handles:
            self._handles.pop().remove()

    def _before(self, model: nn.Module, args: tuple, kwargs: dict) -> None:
        self._given = mapped(_kept, (args, kwargs))  # a network may write over its input
        self._random = torch.get_rng_state()

    def _after(self, model: nn.Module, args: tuple, kwargs: dict, quick: Any) -> Any:
        self.done()
        quick = mapped(_kept, quick)
        self.rewrite.off()
        plain = self._run()
        if same(quick, plain):
            self.rewrite.on()
            return None
        names = []
        for name in (*self.rewrite.absorbed, *self.rewrite.in_place):
            self.rewrite.on(name)
            if not same(self._run(), plain):
                names.append(name)
            self.rewrite.off()
        log.warning(
            "evaluation in fewer passes gives different results at %s; all passes are computed instead",
            ", ".join(names) or "no single layer",
        )
        return plain

    def _run(self) -> Any:
        args, kwargs = mapped(_kept, self._given)
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.set_rng_state(self._random)
            return self.model.forward(*args, **kwargs)


def _kept(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value


def _without_relu(module: nn.Module) -> Callable[[Tensor], Tensor]:
    if not isinstance(module, Quantized):
        return lambda input: input
    if module.writes_back:
        return lambda input: input.copy_(module.output_quantizer(module.input_quantizer(input)))
    return lambda input: module.output_quantizer(module.input_quantizer(input))


def find_spared(model: nn.Module, example: Tensor) -> Spared:
    """Returns the layers that an evaluation of the model can skip or run in place; its quantizers must be calibrated."""
    graph = record(model, example).graph
    if graph is None:
        return Spared()
    calls: dict[str, list[Step]] = {}
    for step in graph.steps:
        if step.op == "module":
            calls.setdefault(step.module, []).append(step)
    absorbed, in_place = [], []
    for name, steps in calls.items():
        module = model.get_submodule(name)
        relu = issubclass(float_class(module), RELUS)
        if module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module):  # computed in another way
            continue
        if relu and all(_is_absorbed(step, model, module) for step in steps):
            absorbed.append(name)
        elif _can_write(module) and all(_owns(step, model) for step in steps):
            in_place.append(name)
    return Spared(tuple(absorbed), tuple(in_place))


def _can_write(module: nn.Module) -> bool:
    """Returns whether a module may overwrite its operand; a ReLU with quantizers gains nothing, since these make new tensors."""
    if issubclass(float_class(module), Add):
        return True
    quantizes = isinstance(module, Quantized) and any(type(module.site(s)) is not nn.Identity for s in module.sites)
    return issubclass(float_class(module), RELUS) and not quantizes


def _owns(step: Step, model: nn.Module) -> bool:
    """Returns whether the first operand is a new tensor that only this step reads."""
    maker = step.sources[0] if step.operands else None
    if maker is None or maker.op != "module" or maker.users != [step] or step.operands[0].index:
        return False
    producer = model.get_submodule(maker.module)
    if producer._forward_hooks:  # a hook may keep the result
        return False
    if type(producer) is nn.Identity:
        return _owns(maker, model)
    return issubclass(float_class(producer), _FRESH)


def _is_absorbed(step: Step, model: nn.Module, relu: nn.Module) -> bool:
    act = nn.functional.relu6 if issubclass(float_class(relu), nn.ReLU6) else torch.relu
    if len(step.operands) != 1 or step.results != 1 or step.changed:
        return False
    if isinstance(relu, Quantized) and isinstance(relu.output_quantizer, Quantizer):
        return relu.enabled and clips(relu.output_quantizer, act)
    return _all_clip(step, model, act)


def _all_clip(step: Step, model: nn.Module, act: Callable[[Tensor], Tensor]) -> bool:
    """Returns whether every user of a step's result first quantizes it, with quantizers that clip as `act` does."""
    return bool(step.users) and all(_clips_there(user, step, model, act) for user in step.users)


def _clips_there(user: Step, step: Step, model: nn.Module, act: Callable[[Tensor], Tensor]) -> bool:
    if user.function in _COMMUTING_FUNCTIONS:
        return len(user.operands) == 1 and _all_clip(user, model, act)
    if user.op != "module":
        return False
    layer = model.get_submodule(user.module)
    if layer._forward_pre_hooks or layer._forward_hooks:
        return False
    if type(layer) in _COMMUTES:
        return _all_clip(user, model, act)
    if not isinstance(layer, Quantized) or not layer.enabled or type(layer).forward not in _READ_QUANTIZED:
        return False
    inputs = [site for site in layer.sites if site.startswith("input")]
    taken = [layer.site(site) for site, maker in zip(inputs, user.sources) if maker is step]
    return len(inputs) == len(user.operands) and all(isinstance(q, Quantizer) and clips(q, act) for q in taken)


@torch.no_grad()
def clips(quantizer: Quantizer, act: Callable[[Tensor], Tensor]) -> bool:
    """Returns whether the quantizer gives the same value with and without `act` (ReLU or ReLU6) before it, for every number.

    A monotone quantizer is constant between an end of the number line and the nearer end of `act`'s range if it returns the same value
    at both. Numbers of many magnitudes are tried, to detect values that depend on the rest of the tensor.
    """
    if "monotone" not in quantizer.properties or not bool(quantizer.ready):
        return False
    shape = (2, *quantizer.shape[1:]) if len(quantizer.shape) > 1 else (256,)
    generator = torch.Generator().manual_seed(0)
    many = torch.randn(shape, generator=generator) * torch.exp(3 * torch.randn(shape, generator=generator))
    probes = (torch.full(shape, -_FAR), torch.full(shape, _FAR), many)
    return all(torch.equal(quantizer(x), quantizer(act(x))) for x in (p.to(quantizer.ready.device) for p in probes))
