"""Units of reconstruction: a layer, or a block around an add or a concatenation, found from the graph."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qexp.errors import QexpError, near
from qexp.layers.calls import all_calls, unrouted
from qexp.layers.quantized import float_class
from qexp.models.modules import Add, Concat
from qexp.network.facts import Facts
from qexp.quantizers.learned_rounding import LearnedRounding
from qexp.system.within import hooked

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Unit:
    """One module of the network, or several in a row, called with one tensor and returning one.

    Attributes:
        name: Of the module, the last one where there are several.
        layers: The layers in it whose roundings are learned, in order.
        activation: The module that follows, if the unit is a layer before a ReLU.
        before: Units that run first, each on the result of the one before it; their layers are among `layers`.
    """

    name: str
    layers: tuple[str, ...]
    activation: Callable[[Tensor], Tensor] | None = None
    before: tuple[Unit, ...] = ()

    @property
    def modules(self) -> tuple[str, ...]:
        """Names of the modules, in order."""
        return (*(unit.name for unit in self.before), self.name)

    def __call__(self, model: nn.Module, x: Tensor) -> Tensor:
        for unit in self.before:
            x = unit(model, x)
        y = model.get_submodule(self.name)(x)
        return y if self.activation is None else self.activation(y)


@dataclass
class _Calls:
    """The recorded call of one module in one run of the network."""

    count: int = 0
    single: bool = True  # one tensor in, one out
    x: Tensor | None = None
    y: Tensor | None = None


def find_units(model: nn.Module, facts: Facts, wanted: str | Sequence[str], example: Tensor) -> list[Unit]:
    """Returns the units in order of execution; each layer whose rounding can be learned is in one of them.

    A block is the module around an `Add` or a `Concat`, and every module of the same class (an inverted residual without a residual). It
    is isolated if the network calls it once, with one tensor, and gets from it one tensor that it makes of that tensor alone; what cannot
    be isolated is split into its layers, with a log line. A layer that runs more than once keeps its nearest roundings.

    Args:
        model: Network with its quantizers attached and fitted.
        facts: Its structure.
        wanted: `layers`, `blocks`, or the names of modules that are to be units, all other layers being units of their own.
        example: Images `[N, C, H, W]`.

    Raises:
        QexpError: A named unit that does not exist, cannot be isolated, overlaps another or holds nothing to learn; nothing to learn at
            all.
    """
    learns = [name for name in facts.order if _learns(model.get_submodule(name))]
    if not learns:
        raise QexpError(
            "reconstruction found no weight with a LearnedRounding quantizer; choose quant=adaround, brecq or qdrop, or give the recipe "
            "weight._target_: qexp.quantizers.learned_rounding.LearnedRounding"
        )
    if isinstance(wanted, str) and wanted not in ("layers", "blocks"):
        raise QexpError(f"units={wanted!r}; allowed are layers, blocks, or a list of module names")
    named = () if isinstance(wanted, str) else tuple(wanted)
    blocks = _block_names(model) if wanted == "blocks" else list(named)
    for name in named:
        _check_name(model, name, named)
    calls = watch(model, {*blocks, *learns}, example)
    if wanted == "blocks" and not blocks:
        log.info("reconstruction: no block found (a module around an add or a concatenation); layer by layer instead")

    units, taken = [], set()
    for name in blocks:
        inside = tuple(layer for layer in learns if layer == name or layer.startswith(name + "."))
        why = "it holds no weight whose rounding is learned" if not inside else _why_not(model, name, inside, calls)
        if why and name in named:
            raise QexpError(f"units: {name} cannot be reconstructed: {why}; name other modules, or units=layers")
        if why and inside:
            log.info("reconstruction: block %s cannot be isolated (%s); layer by layer instead", name, why)
        elif not why:
            units.append(Unit(name, inside, _activation(model, facts, name)))
            taken.update(inside)
    for name in learns:
        if name in taken:
            continue
        why = _why_not(model, name, (name,), calls)
        if why:
            log.info("reconstruction: layer %s keeps its nearest roundings (%s)", name, why)
        else:
            units.append(Unit(name, (name,), _activation(model, facts, name)))
    return sorted(units, key=lambda unit: learns.index(unit.layers[0]))


def _learns(layer: nn.Module) -> bool:
    return isinstance(getattr(layer, "weight_quantizer", None), LearnedRounding)


def _block_names(model: nn.Module) -> list[str]:
    """Returns the outermost modules around a join, and those of the same classes."""
    with all_calls(model):
        joins = [name for name, module in model.named_modules() if issubclass(float_class(module), Add | Concat)]
    around = {name.rpartition(".")[0] for name in joins}
    if "" in around:
        log.info(
            "reconstruction: an add or concatenation of the network itself has no block around it; its layers go one by one"
        )
        around.discard("")
    kinds = {unrouted(type(model.get_submodule(name))) for name in around}
    kinds = {kind for kind in kinds if not kind.__module__.startswith("torch.nn")}
    alike = {
        name
        for name, module in model.named_modules()
        if name and any(isinstance(module, kind) or _parent_of(type(module), kind) for kind in kinds)
    }
    found = around | alike
    return sorted(n for n in found if not any(n.startswith(other + ".") for other in found))


def _parent_of(kind: type, other: type) -> bool:
    """Whether `other` is a form of `kind` (torchvision's block and the same block with its add exposed)."""
    return issubclass(other, kind) and not kind.__module__.startswith("torch.nn")


def _check_name(model: nn.Module, name: str, named: Sequence[str]) -> None:
    modules = [n for n, _ in model.named_modules() if n]
    if name not in modules:
        raise QexpError(f"units: the model has no module {name!r}{near(name, modules)}")
    for other in named:
        if other != name and name.startswith(other + "."):
            raise QexpError(f"units: {name} lies inside {other}; a layer belongs to one unit")


@torch.no_grad()
def watch(model: nn.Module, names: set[str], example: Tensor) -> dict[str, _Calls]:
    """Returns the recorded calls of the named modules in one run of the network."""
    calls = {name: _Calls() for name in names}

    def enters(name: str):
        def hook(_, args: tuple, kwargs: dict) -> None:
            call = calls[name]
            call.count += 1
            call.single = call.single and len(args) == 1 and not kwargs and isinstance(args[0], Tensor)
            call.x = args[0].clone() if call.single else None  # what follows may change it in place

        return hook

    def leaves(name: str):
        def hook(_, __, y: object) -> None:
            call = calls[name]
            call.single = call.single and isinstance(y, Tensor)
            call.y = y.clone() if call.single else None

        return hook

    entering = hooked(model.get_submodule(n).register_forward_pre_hook(enters(n), with_kwargs=True) for n in names)
    with entering, hooked(model.get_submodule(n).register_forward_hook(leaves(n)) for n in names):
        model(example)
    return calls


def _why_not(model: nn.Module, name: str, inside: Sequence[str], calls: dict[str, _Calls]) -> str:
    """Returns why a module cannot run apart from the network; empty if it can."""
    call = calls[name]
    if call.count != 1:
        return f"it runs {call.count} times"
    if not call.single:
        return "it does not take one tensor and return one"
    for layer in inside:
        if calls[layer].count != 1:
            return f"its layer {layer} runs {calls[layer].count} times"
    alone = _alone(model.get_submodule(name), call.x, {layer: model.get_submodule(layer) for layer in inside})
    if isinstance(alone, str):
        return alone
    if alone.shape != call.y.shape or not torch.equal(alone, call.y):
        return "what it returns depends on more than its input"
    return ""


@torch.no_grad()
def _alone(module: nn.Module, x: Tensor, layers: dict[str, nn.Module]) -> Tensor | str:
    """Returns a module's result for one tensor, or why the result depends on more than that."""
    ran: set[str] = set()
    try:
        with hooked(m.register_forward_hook(lambda *_, name=name: ran.add(name)) for name, m in layers.items()):
            y = module(x)
    except Exception as error:  # whatever a foreign module raises when it lacks what the network had set up
        return f"alone it raises {type(error).__name__}: {error}"
    outside = sorted(set(layers) - ran)
    return f"its layer {outside[0]} is called from elsewhere" if outside else y


def _activation(model: nn.Module, facts: Facts, name: str) -> Callable[[Tensor], Tensor] | None:
    if name not in facts.followed_by_relu:
        return None
    six = any(issubclass(float_class(model.get_submodule(c)), nn.ReLU6) for c in facts.consumers(name))
    return F.relu6 if six else F.relu
