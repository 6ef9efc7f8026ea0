"""Training steps with fewer passes over memory: a batch norm computes the residual sum and the ReLU after it too.

The recorded graph holds the readers of each tensor. Where a batch norm's result goes only into a sum, or only into a ReLU, and the sum's
only into a ReLU, one operator (`qexp_kernels.batch_norm`) computes them forward and backward; the sum and the ReLU return what it made.
Running statistics advance as PyTorch's do. Before the first step, the float network is computed both ways on a few images.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import qexp_kernels as kernels
import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from qexp.errors import QexpError
from qexp.layers.quantized import Quantized, QuantReLU, QuantReLU6
from qexp.layers.swap import quantizers_off
from qexp.models.modules import Add
from qexp.network.graph import Graph, Step, near
from qexp.network.quick_gradients import quick_gradients, read_twice, reread
from qexp.network.recorder import record, several

log = logging.getLogger(__name__)

_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
_RELUS = (nn.ReLU, nn.ReLU6, QuantReLU, QuantReLU6)
_FAR = 1e-3  # relative distance of the two results that only another computation explains
_IMAGES = 4  # of the comparison
_LOST = (
    "the batch norm's result does not reach {add} in this step as it did when the network was read; write the network so that it makes the "
    "same calls for all images, or use trainer.fused_norms=false"
)


@contextmanager
def lean_training(model: nn.Module, example: Tensor) -> Iterator[list[Fused]]:
    """Makes training steps of the model compute the same in fewer passes over memory inside a `with` block.

    Only steps on the CPU in training mode change; a layer with hooks computes as it is. Where the model has no graph, or compiled kernels
    are missing, nothing changes. Where the results differ, a warning says so, and nothing changes. Yields what is computed together.

    Args:
        model: The network, with or without quantizers.
        example: Images `[N, ...]` to record the graph with.
    """
    usable = kernels.compiled("batch_norm") and isinstance(example, Tensor)
    graph = record(model, example).graph if usable else None
    found = find_fused(model, graph) if graph is not None else []
    if found and (reason := _disagrees(model, example, found)):
        log.warning("training steps compute all passes over memory: %s", reason)
        found = []
    for fused in found:
        fused.on()
    try:
        with quick_gradients(model):
            yield found
    finally:
        for fused in found:
            fused.off()


@dataclass(eq=False)
class Fused:
    """A batch norm, and the sum and the ReLU that only its result reaches.

    Attributes:
        norm, add, relu: The layers; each is called once in a step, but a ReLU may serve several batch norms.
        second: The norm's result is the second operand of the sum.
        names: Their names, in order.
    """

    norm: nn.modules.batchnorm._BatchNorm
    add: nn.Module | None = None
    relu: nn.Module | None = None
    second: bool = False
    names: tuple[str, ...] = ()
    _given: Tensor | None = field(default=None, repr=False)  # to the norm, until the sum is computed

    @property
    def layers(self) -> list[nn.Module]:
        """The layers, in order."""
        return [layer for layer in (self.norm, self.add, self.relu) if layer is not None]

    def on(self) -> None:
        """Computes the layers together."""
        self.norm.forward = self._norm
        if self.add is not None:
            self.add.forward = self._add
        if self.relu is not None and "forward" not in vars(self.relu):
            self.relu.forward = _Relu(self.relu).forward

    def off(self) -> None:
        """Restores the layers."""
        self._given = None
        for layer in self.layers:
            vars(layer).pop("forward", None)

    def _norm(self, input: Tensor) -> Tensor:
        if not self._computes(input):
            return type(self.norm).forward(self.norm, input)
        if self.add is None:
            return self._result(input, None)
        if self._given is not None:
            raise QexpError(f"{self.names[0]}: {_LOST.format(add=self.names[1])}")
        self._given = input
        return input

    def _add(self, a: Tensor, b: Tensor) -> Tensor:
        given, self._given = self._given, None
        mine, other = (b, a) if self.second else (a, b)
        if given is None:
            return type(self.add).forward(self.add, a, b)
        if mine is not given:
            raise QexpError(f"{self.names[1]}: {_LOST.format(add='it')}")
        if other.shape != given.shape or other.dtype != given.dtype:
            made = type(self.norm).forward(self.norm, given)
            return type(self.add).forward(self.add, *((other, made) if self.second else (made, other)))
        return self._result(given, reread(other))

    def _computes(self, x: Tensor) -> bool:
        norm = self.norm
        return (
            norm.training
            and norm.track_running_stats
            and x.is_cpu
            and x.is_floating_point()
            and x.numel() > x.shape[1]
            and torch.is_grad_enabled()
            and not _has_any_global_hook()
            and not any(layer._forward_hooks or layer._forward_pre_hooks for layer in self.layers)
        )

    def _result(self, x: Tensor, added: Tensor | None) -> Tensor:
        norm, relu = self.norm, self.relu
        low = -math.inf if relu is None else 0.0
        high = 6.0 if isinstance(relu, nn.ReLU6) else math.inf
        y, mean, variance, again = kernels.batch_norm(
            x, norm.weight, norm.bias, eps=norm.eps, added=added, low=low, high=high
        )
        count = x.numel() // x.shape[1]
        with torch.no_grad():
            norm.num_batches_tracked.add_(1)
            norm.running_mean.lerp_(mean, norm.momentum)
            norm.running_var.lerp_(variance * (count / (count - 1)), norm.momentum)
        if relu is not None:
            relu.forward.__self__.computed = y
        return read_twice(y, again)


class _Relu:
    """A ReLU that passes on what has been computed as its result."""

    def __init__(self, layer: nn.Module) -> None:
        self.layer = layer
        self.computed: Tensor | None = None

    def forward(self, input: Tensor) -> Tensor:
        computed, self.computed = self.computed, None
        if computed is None or input is not computed:
            return type(self.layer).forward(self.layer, input)
        quantizes = isinstance(self.layer, Quantized) and self.layer.enabled
        return self.layer.output_quantizer(input) if quantizes else input


def find_fused(model: nn.Module, graph: Graph) -> list[Fused]:
    """Returns the batch norms of a network with what can be computed together with each."""
    times: dict[str, int] = {}
    for step in graph.steps:
        times[step.module] = times.get(step.module, 0) + 1
    found: list[Fused] = []
    for step in graph.steps:
        if step.op != "module" or not _is_norm(model.get_submodule(step.module)) or times[step.module] > 1:
            continue
        add = _only(step, model, _is_sum)
        if add is not None and (
            times[add.module] > 1 or add.module in {f.names[1] for f in found if f.add is not None}
        ):
            add = None
        relu = _only(add or step, model, _is_relu)
        steps = [s for s in (step, add, relu) if s is not None]
        modules = [model.get_submodule(s.module) for s in steps]
        found.append(
            Fused(
                modules[0],
                None if add is None else modules[1],
                None if relu is None else modules[-1],
                add is not None and add.sources[0] is not step,
                tuple(s.module for s in steps),
            )
        )
    return found


def _only(step: Step, model: nn.Module, suits: Callable[[nn.Module], bool]) -> Step | None:
    """Returns the step that alone reads a step's result, if it is a layer that suits."""
    if len(step.users) != 1 or step.results != 1 or step.changed:
        return None
    user = step.users[0]
    if user.op != "module" or sum(source is step for source in user.sources) != 1 or user.changed:
        return None
    return user if suits(model.get_submodule(user.module)) else None


def _is_norm(layer: nn.Module) -> bool:
    own = type(layer) in _NORMS and "forward" not in vars(layer)
    return own and layer.affine and layer.track_running_stats and layer.momentum is not None


def _is_sum(layer: nn.Module) -> bool:
    return type(layer) is Add and "forward" not in vars(layer)


def _is_relu(layer: nn.Module) -> bool:
    if type(layer) not in _RELUS or "forward" in vars(layer):
        return False
    return not isinstance(layer, Quantized) or (type(layer.input_quantizer) is nn.Identity and not layer.inplace)


@torch.no_grad()
def _disagrees(model: nn.Module, example: Tensor, found: list[Fused]) -> str:
    """Returns why a float network may not compute in fewer passes, empty where it gives the same result; restores its buffers."""
    images = several(example)
    noise = torch.randn(_IMAGES, *images.shape[1:], generator=torch.Generator().manual_seed(0)).to(images)
    images = images[torch.arange(_IMAGES) % len(images)] + noise * images.std()
    modes = [(m, m.training) for m in model.modules()]
    kept = {name: buffer.clone() for name, buffer in model.named_buffers()}
    results = []
    model.train()
    try:
        with quantizers_off(model), torch.enable_grad(), torch.random.fork_rng(devices=[]):
            for switch in (Fused.off, Fused.on):
                for fused in found:
                    switch(fused)
                torch.manual_seed(0)
                results.append(model(images))
    except Exception as error:  # the forward of a user's model may raise anything in training mode without targets
        return str(error) if results else f"the network does not run on images alone in training mode ({error})"
    finally:
        for fused in found:
            fused.off()
        for name, buffer in model.named_buffers():
            buffer.copy_(kept[name])
        for module, training in modes:
            module.training = training
    return (
        "" if near(*results, _FAR) else "the network gives another result when batch norms compute sums and ReLUs too"
    )
