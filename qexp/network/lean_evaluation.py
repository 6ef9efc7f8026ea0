"""Evaluation with fewer passes over memory, to the same numbers.

A ReLU whose result goes into quantizers alone, each of which clips at zero anyway, is left out: the quantizer's clamp does it. Other ReLUs
and residual adds write over their operand where nobody else reads it. Who reads what comes from the recorded graph, in which the readers
of a tensor that a ReLU wrote over read the ReLU's result; the first batch that runs is computed both ways and has to be equal to the bit.
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

# a maximum, a copy or another shape commutes with a ReLU
_COMMUTES = (nn.Identity, nn.Dropout, nn.Flatten, nn.MaxPool2d)
_COMMUTING_FUNCTIONS = {"flatten", "view", "reshape", "contiguous"}
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
def lean(model: nn.Module, example: Tensor) -> Iterator[Spared]:
    """Inside, the model in evaluation mode computes the same values in fewer passes over memory; not for gradients.

    Where the model has no graph nothing changes. The first batch is computed in all passes too: where the results differ in a bit, a
    warning names the layers, and everything is computed in all passes from there on. Yields what was spared.

    Args:
        model: The network, its quantizers calibrated.
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
    """Switches what is spared, all of it or single layers, on and off."""

    def __init__(self, model: nn.Module, spared: Spared) -> None:
        self.absorbed = {name: model.get_submodule(name) for name in spared.absorbed}
        self.in_place = {name: model.get_submodule(name) for name in spared.in_place}
        self._before: list[tuple[nn.Module, bool | None]] = []

    def on(self, only: str | None = None) -> None:
        """Leaves out ReLUs and writes in place; `only` one layer, or all."""
        for name, module in self.absorbed.items():
            if only in (None, name):
                module.forward = _without_relu(module)
        for name, module in self.in_place.items():
            if only in (None, name):
                self._before.append((module, vars(module).get("inplace")))  # None: that of the class
                module.inplace = True

    def off(self) -> None:
        """Leaves every module as it was."""
        for module in self.absorbed.values():
            vars(module).pop("forward", None)
        while self._before:
            module, inplace = self._before.pop()
            if inplace is None:  # nothing may stay behind: what a module is set to enters the hash of kept statistics
                del module.inplace
            else:
                module.inplace = inplace


class _FirstBatch:
    """Computes the first batch in all passes too, and compares."""

    def __init__(self, model: nn.Module, rewrite: _Rewrite) -> None:
        self.model, self.rewrite = model, rewrite
        self._handles: list[Any] = []
        self._given: tuple = ()
        self._random: Tensor | None = None

    def watch(self) -> None:
        """Waits for the first batch."""
        self._handles = [
            self.model.register_forward_pre_hook(self._before, with_kwargs=True),
            self.model.register_forward_hook(self._after, with_kwargs=True),
        ]

    def done(self) -> None:
        """Waits no longer."""
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
            "evaluation in fewer passes gives other results at %s; all passes are computed instead",
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
    """Returns what an evaluation of the model, its quantizers calibrated, can do without."""
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
        if module._forward_hooks or module._forward_pre_hooks:
            continue
        if relu and all(_is_absorbed(step, model, module) for step in steps):
            absorbed.append(name)
        elif _can_write(module) and all(_owns(step, model) for step in steps):
            in_place.append(name)
    return Spared(tuple(absorbed), tuple(in_place))


def _can_write(module: nn.Module) -> bool:
    """Whether a module may write over its operand: a ReLU whose quantizers make new tensors anyway gains nothing."""
    if issubclass(float_class(module), Add):
        return True
    quantizes = isinstance(module, Quantized) and any(type(module.site(s)) is not nn.Identity for s in module.sites)
    return issubclass(float_class(module), RELUS) and not quantizes


def _owns(step: Step, model: nn.Module) -> bool:
    """Whether nobody but this step reads its first operand, a new tensor."""
    maker = step.sources[0] if step.operands else None
    if maker is None or maker.op != "module" or maker.users != [step] or step.operands[0].index:
        return False
    producer = model.get_submodule(maker.module)
    if producer._forward_hooks:  # who looks at the result may keep it
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
    """Whether everything that uses a step's result quantizes it first, by quantizers that clip as `act` does."""
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
