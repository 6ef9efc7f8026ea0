"""Records the graph of a network while it runs, and verifies the graph by replaying it on other images.

The first run under a torch-function mode records every leaf module, every functional call, and the tensors between them. The recorded
arguments are those of the run, defaults and keywords included. A second run uses other images and a larger batch. It must make the same
calls with the same constants; numbers that depend on the batch size are recognised. Replaying the records on the images of the second
run must give its result to the bit. Where one of these checks fails, there is no graph, and the recording holds the reason.
"""

from __future__ import annotations

import copy
import inspect
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle

from qexp.layers.calls import call_of, function_name, kind_of, local_name
from qexp.layers.forms import STEPS, Form, form
from qexp.layers.quantized import GRADIENT, QUANTIZED, WEIGHTED, float_class, main
from qexp.layers.running import reading
from qexp.layers.swap import evaluating, quantizers_off
from qexp.models.operations import MatMul
from qexp.network.graph import Graph, Ref, Step, mapped, same, tensors
from qexp.network.made_calls import MadeCall, MadeCalls, alike
from qexp.network.two_runs import Refused, merge
from qexp.network.unreachable_weights import Products
from qexp.system.within import hooked

# functions that turn tensor values into Python numbers: control flow may depend on these
_READS = {
    "item",
    "tolist",
    "__bool__",
    "__float__",
    "__int__",
    "__index__",
    "__complex__",
    "numpy",
    "equal",
    "allclose",
}
_READS |= {"is_nonzero", "__array__", "__contains__"}
# functions of a tensor's size and type that read none of its values
_FRESH = {f"new_{kind}" for kind in ("zeros", "ones", "full", "empty")}
_FRESH |= {f"{kind}_like" for kind in ("zeros", "ones", "full", "empty")}
PRODUCTS = {"linear", "conv1d", "conv2d", "conv3d"}
_SITES = ("weight", "bias", "running_mean", "running_var")
_VARIADIC = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)

Shapes = dict[str, tuple[int, ...]]


@dataclass
class Recording:
    """Holds the result of recording one run of a network.

    Attributes:
        graph: The verified steps; None where replaying them does not reproduce the network.
        error: Why there is no graph; empty if there is one.
        images: Batch size of the shapes.
        shapes: Shapes of the sites of each layer that can carry quantizers, call by call; layers in the order of their first calls.
        products: The products that were computed outside the layers of known types.
        before_weights: Layers whose result goes into a weighted layer, through any other steps.
        made: The function calls that a module could stand for, by module and local name; those that ran alike in each run.
    """

    graph: Graph | None
    error: str
    images: int
    shapes: dict[str, tuple[Shapes, ...]]
    products: Products
    before_weights: frozenset[str] = frozenset()
    made: dict[tuple[str, str], MadeCall] = field(default_factory=dict)


@torch.no_grad()
def record(model: nn.Module, example: Tensor, leaves: tuple[type[nn.Module], ...] = ()) -> Recording:
    """Returns the recording of one run of the float network in evaluation mode; leaves the model unchanged.

    The run uses copies of the modules that contain the leaves, and of their buffers, because a forward pass may change them. Leaves,
    their quantizers and all parameters are shared.

    Args:
        model: The network; its quantizers are disabled during the run.
        example: Images `[N, ...]`. The network runs on the first two, because a single image may lose its batch dimension; a single
            image is completed by its mirror image. The network also runs on three other images derived from these.
        leaves: Further module types to treat as leaves, besides quantizable layers, sums, concatenations and torch's own modules.
    """
    with evaluating(model), quantizers_off(model), reading(), torch.random.fork_rng(devices=[]):
        images = several(example)
        run = _Run(_copied(model, leaves), leaves)
        try:
            result = run(images)
        except Exception:  # a network that runs only without recording (or not on two images) still has shapes
            return _unwatched(model, images, example, leaves)
        graph, error = None, ""
        seconds: list[_Run] = []
        try:
            graph = _proved(model, run, result, images, leaves, seconds)
        except Refused as reason:
            error = str(reason)
        except Exception as reason:  # the forward of a user's model may raise anything on other images
            error = f"{type(reason).__name__}: {reason}".splitlines()[0]
        before = _before_weights(run)
        return Recording(
            graph,
            error,
            len(images),
            run.shapes,
            run.products,
            before,
            alike(run.made, [other.made for other in seconds]),
        )


def _before_weights(run: _Run) -> frozenset[str]:
    """Returns the layers whose result goes into a weighted layer, through any other steps."""
    modules = dict(run.model.named_modules())
    feeding: set[Step] = set()
    for step in reversed(run.steps):
        weighted = step.op == "module" and issubclass(float_class(modules[step.module]), WEIGHTED)
        if weighted or step.function in PRODUCTS or step in feeding:
            feeding.update(step.sources)
    return frozenset(step.module for step in feeding if step.op == "module")


def _proved(
    model: nn.Module,
    run: _Run,
    result: Any,
    images: Tensor,
    leaves: tuple[type[nn.Module], ...],
    runs: list[_Run],
) -> Graph:
    """Returns the graph of a run, after a second run on other images and its replay; puts the other runs into `runs`."""
    if not isinstance(images, Tensor):
        raise Refused("the network takes a list of images")  # without a graph, the layers still have shapes
    others = other_images(images)
    second = _Run(_copied(model, leaves), leaves)
    expected = second(others)
    runs.append(second)
    merge(run.steps, second.steps, len(images), len(others))
    graph = Graph(run.steps)
    try:
        with _Nothing():  # attention takes another code path when no mode is active
            equal = same(graph.replay(others), expected)
    except Exception:  # calls that do not fit other images
        equal = False
    if not equal:
        read = f"; values of tensors are read in {', '.join(dict.fromkeys(run.reads))}" if run.reads else ""
        raise Refused(f"replaying the calls of one run on other images gives a different result{read}")
    if run.reads:  # decisions that depend on values may differ for unusual values
        for scale in (0.0, -4.0, 25.0):
            third = _Run(_copied(model, leaves), leaves)
            try:
                third(images * scale if images.is_floating_point() else images * 0)
            except Exception:
                continue
            runs.append(third)
            merge(run.steps, third.steps, len(images), len(images))
    _finish(graph)
    return graph


def _finish(graph: Graph) -> None:
    """Notes the readers of each step."""
    for step in graph.steps:
        for ref in (*step.operands, *(leaf for leaf in step.changed if isinstance(leaf, Ref))):
            if step not in ref.step.users:
                ref.step.users.append(step)


def _unwatched(model: nn.Module, images: Tensor, example: Tensor, leaves: tuple[type[nn.Module], ...]) -> Recording:
    """Returns a recording without a graph: runs the network without the mode, for its shapes; passes its exceptions on."""
    run = _Run(_copied(model, leaves), leaves, watched=False)
    try:
        run(images)
    except Exception:  # the network does not run on two images
        run = _Run(_copied(model, leaves), leaves)
        run(example)
        return Recording(None, "the network does not run on two images", len(example), run.shapes, run.products)
    try:
        _Run(_copied(model, leaves), leaves)(images)
        error = "the network does not run twice"
    except Exception as reason:
        error = f"the network does not run while it is recorded ({type(reason).__name__}: {reason})".splitlines()[0]
    return Recording(None, error, len(images), run.shapes, run.products)


def several(example: Tensor | list[Tensor]) -> Tensor | list[Tensor]:
    """Returns the first two images of an example (a tensor, or a list of images); a single one is completed by its mirror image."""
    if isinstance(example, list):  # a detector takes images of several sizes
        return [*example, *(image.flip(-1) for image in example)][:2]
    return example[:2] if len(example) > 1 else torch.cat([example, example.flip(-1)])


def other_images(images: Tensor) -> Tensor:
    """Returns three images in the value range of the given ones: noise, a negative, and an image upside down."""
    if not images.is_floating_point():
        flat = images[:1].flatten()
        order = torch.randperm(len(flat), generator=torch.Generator().manual_seed(0)).to(flat.device)
        return torch.cat([flat[order].reshape(images[:1].shape), images[:1].flip(-1), images[-1:].flip(-2)])
    low, high = float(images.min()), float(images.max())
    if low == high:
        low, high = low - 1.0, high + 1.0
    noise = torch.rand(images[:1].shape, generator=torch.Generator().manual_seed(0), dtype=torch.float32)
    noise = (low + (high - low) * noise).to(images.device, images.dtype)
    upside_down = images[-1:].flip(-2) if images.ndim > 2 else images[-1:].flip(-1)
    return torch.cat([noise, low + high - images[:1], upside_down])


# modules of torch that are networks of layers
MADE_OF_LAYERS = (nn.Sequential, nn.Transformer, nn.TransformerEncoder, nn.TransformerEncoderLayer)
MADE_OF_LAYERS += (nn.TransformerDecoder, nn.TransformerDecoderLayer)


def _counted_elsewhere(module: nn.Module) -> bool:
    """Returns whether a module is a layer whose products are counted from its shapes, or that has none; a matrix product is neither."""
    kind = float_class(module)
    return kind in QUANTIZED and not issubclass(kind, MatMul)


def is_leaf(module: nn.Module, leaves: tuple[type[nn.Module], ...] = ()) -> bool:
    """Returns whether a module is one step: a quantizable layer, a sum, a concatenation, or one of torch's own modules."""
    if float_class(module) in QUANTIZED or isinstance(module, (*STEPS, torch.jit.ScriptModule, *leaves)):
        return True
    return type(module).__module__.startswith("torch.nn") and not isinstance(module, MADE_OF_LAYERS)


def _copied(model: nn.Module, leaves: tuple[type[nn.Module], ...]) -> nn.Module:
    kept = [m for name, m in model.named_modules() if name and is_leaf(m, leaves) and _computes(m)]
    try:
        return copy.deepcopy(model, {id(m): m for m in (*kept, *model.parameters())})
    except Exception:  # a model that cannot be copied (it holds a lock or a file, say) runs itself
        return model


def _computes(module: nn.Module) -> bool:
    """Returns whether a module can be called; `ModuleList` and similar containers cannot."""
    return isinstance(module, torch.jit.ScriptModule) or type(module).forward is not nn.Module.forward


class _Nothing(TorchFunctionMode):
    """Changes nothing; code that checks for an active mode takes the same path as in the recorded run."""

    def __torch_function__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        return func(*args, **(kwargs or {}))


class _Mode(TorchFunctionMode):
    """Passes every functional call to the run."""

    def __init__(self, run: _Run) -> None:
        super().__init__()
        self.run = run

    def __torch_function__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        return self.run.called(func, args, kwargs or {})


@dataclass
class _Frame:
    """A running module: its name with the number of the call, and its functional calls so far, counted by kind."""

    module: nn.Module
    name: str
    leaf: bool
    kinds: Counter = field(default_factory=Counter)
    versions: list[tuple[Tensor, int]] = field(default_factory=list)


class _Run:
    """Records one run of a network."""

    def __init__(self, model: nn.Module, leaves: tuple[type[nn.Module], ...], watched: bool = True) -> None:
        self.model, self.leaves, self.watched = model, leaves, watched
        self.names = {id(m): n for n, m in model.named_modules()}
        self.steps: list[Step] = []
        self.shapes: dict[str, tuple[Shapes, ...]] = {}
        self.reads: list[str] = []
        self.made = MadeCalls()
        self.products = Products(model)
        self._refs: dict[int, Ref] = {}
        self._alive: list[Tensor] = []  # ids are reused as soon as a tensor is gone
        self._shared: dict[int, list[Tensor]] = {}  # tensors by memory address
        self._frames: list[_Frame] = []
        self._calls: Counter = Counter()

    def __call__(self, images: Tensor) -> Any:
        images = mapped(torch.clone, images)  # a network may write over its input
        self.steps.append(start := Step("input", "input", "input", depends=True))
        if isinstance(images, Tensor):
            self._made(images, Ref(start))
        self.products.image(tensors(images))
        with ExitStack() as stack:
            stack.enter_context(self._hooks())
            if self.watched:
                stack.enter_context(_Mode(self))
            result = self.model(images)
        given = mapped(self._ref, result)
        operands = tuple(self._refs[id(t)] for t in tensors(result) if id(t) in self._refs)
        self.steps.append(Step("output", "output", "output", None, (given,), {}, operands, depends=True))
        return mapped(lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf, result)

    def _ref(self, leaf: Any) -> Any:
        return self._refs.get(id(leaf), leaf) if isinstance(leaf, Tensor) else leaf

    def _made(self, tensor: Tensor, ref: Ref) -> None:
        if id(tensor) not in self._refs:
            self._alive.append(tensor)
            if where := _memory(tensor):
                self._shared.setdefault(where, []).append(tensor)
        self._refs[id(tensor)] = ref

    def called(self, func: Callable, args: tuple, kwargs: dict) -> Any:
        """Runs a function for the network and records the call; returns its result."""
        given = tensors((args, kwargs))
        versions = [(t, _version(t)) for t in given]
        out = func(*args, **kwargs)
        with torch._C.DisableTorchFunction():
            name, made = function_name(func), tensors(out)
            self._alive.extend(made)
            self.products.through(
                [] if name in _FRESH else given, [*made, *(t for t, version in versions if _version(t) != version)]
            )
            known = any(_counted_elsewhere(frame.module) for frame in self._frames)
            if not known:
                self.products.count(name, args, kwargs, out, self._frames[-1].name if self._frames else "")
            if any(frame.leaf for frame in self._frames):
                return out
            if name in _READS and any(map(self.products.is_image, given)):
                where = self._frames[-1].name if self._frames else ""
                self.reads.append(f"{where or type(self.model).__name__} ({name})")
            if made or any(_version(t) != version for t, version in versions):
                image = any(map(self.products.is_image, (*given, *made)))
                local = self._numbered(name, args, kwargs, image)
                self._add("function", local, name, func, args, kwargs, made, versions)
        return out

    def _numbered(self, function: str, args: tuple, kwargs: dict, image: bool) -> str:
        """Returns the name of a function call; keeps the call itself if it computes with the images."""
        frame = self._frames[-1] if self._frames else _Frame(self.model, "", False)
        kind = kind_of(function)
        number = frame.kinds[kind]
        frame.kinds[kind] += 1
        local = local_name(frame.module, kind, number)
        if image and self._frames:
            self.made.add((self.names[id(frame.module)], local), kind, number, self._bare(form(function, args, kwargs)))
        return ".".join(filter(None, (frame.name, local)))

    def _bare(self, found: Form | None) -> Form | None:
        """Returns a form without its tensors, which are of one run; None unless they are real numbers and depend on the images."""
        if found is None or not all(x.is_floating_point() and self.products.is_image(x) for x in found.operands):
            return None
        return replace(found, operands=())

    def _add(
        self,
        op: str,
        name: str,
        target: str,
        call: Callable,
        args: tuple,
        kwargs: dict,
        made: list[Tensor],
        versions: list[tuple[Tensor, int]],
    ) -> None:
        given = tensors(_in_order(call, args, kwargs))
        operands = tuple(self._refs[id(t)] for t in given if id(t) in self._refs)
        returned = {id(t) for t in made}
        changed: dict[int, Tensor] = {}
        for tensor, version in versions:
            if _version(tensor) != version:  # every tensor in this memory has new values from here on
                for other in (tensor, *self._shared.get(_memory(tensor), ())):
                    if id(other) not in returned:
                        changed[id(other)] = other
        depends = any(map(self.products.is_image, (*given, *changed.values()))) and target not in _FRESH
        step = Step(
            op,
            name,
            target,
            call,
            mapped(self._ref, args),
            mapped(self._ref, kwargs),
            operands,
            tuple(map(self._ref, changed.values())),
            len(made),
            depends=depends,
        )
        self.steps.append(step)
        for k, tensor in enumerate((*made, *changed.values())):
            self._made(tensor, Ref(step, k))
        if depends:
            self.products.image([*made, *changed.values()])

    def _before(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        name = self.names[id(module)]
        inside = any(frame.leaf for frame in self._frames)
        if self._frames and (call := call_of(self._frames[-1].module, module)) is not None:
            self._frames[-1].kinds[call.kind] += 1  # the module stands for a function call
        leaf = bool(name) and is_leaf(module, self.leaves)
        count = 0
        if not inside and name:
            count = self._calls[name]
            self._calls[name] += 1
        frame = _Frame(module, name + (f"@{count}" if count else ""), leaf)
        if leaf and not inside:
            with torch._C.DisableTorchFunction():
                frame.versions = [(t, _version(t)) for t in tensors((args, kwargs))]
        self._frames.append(frame)

    def _after(self, module: nn.Module, args: tuple, kwargs: dict, out: Any) -> None:
        while (frame := self._frames.pop()).module is not module:  # the call raised, and the network caught it
            pass
        self.made.ran(self.names[id(module)], frame.kinds)
        if out is None:  # the call raised, and its caller continues without a result
            return
        with torch._C.DisableTorchFunction():
            name = self.names[id(module)]
            if float_class(module) in QUANTIZED:
                self.shapes[name] = (*self.shapes.get(name, ()), _sites(module, args, kwargs, out))
            if not frame.leaf or any(outer.leaf for outer in self._frames):
                return
            made = tensors(out)
            self._alive.extend(made)
            self.products.through(tensors((args, kwargs)), made)
            self._add("module", frame.name, name, module, args, kwargs, made, frame.versions)

    def _hooks(self) -> AbstractContextManager[None]:
        return hooked(self._put_on())

    def _put_on(self) -> Iterator[RemovableHandle]:
        compiled: list[str] = []
        for name, module in self.model.named_modules():
            if isinstance(module, torch.jit.ScriptModule):  # takes no hooks, so its products cannot be counted exactly
                if not any(name.startswith(f"{outer}.") for outer in compiled):
                    self.products.unseen(name, module)
                compiled.append(name)
                continue
            yield module.register_forward_pre_hook(self._before, prepend=True, with_kwargs=True)
            yield module.register_forward_hook(self._after, with_kwargs=True, always_call=True)


def _sites(module: nn.Module, args: tuple, kwargs: dict, out: Any) -> Shapes:
    """Returns the shapes of a layer's sites in one call."""
    given = tensors(_in_order(module, args, kwargs))
    sites = {"input" if len(given) == 1 else f"input.{i}": tuple(x.shape) for i, x in enumerate(given)}
    out = main(out)
    if isinstance(out, Tensor):
        sites["output"] = tuple(out.shape)
        if issubclass(float_class(module), WEIGHTED):
            sites[GRADIENT] = tuple(out.shape)
    for site in _SITES:
        tensor = getattr(module, site, None)
        if isinstance(tensor, Tensor):
            sites[site] = tuple(tensor.shape)
    return sites


def _in_order(call: Callable, args: tuple, kwargs: dict) -> tuple:
    """Returns the arguments in the order of the signature, whether passed by position or by name."""
    if not kwargs:
        return args
    names = _signature(float_class(call).forward if isinstance(call, nn.Module) else call)
    order = {name: i for i, name in enumerate(names)}
    return (*args, *(kwargs[k] for k in sorted(kwargs, key=lambda k: order.get(k, len(order)))))


@lru_cache(maxsize=256)
def _signature(function: Callable) -> tuple[str, ...]:
    try:
        return tuple(p.name for p in inspect.signature(function).parameters.values() if p.kind not in _VARIADIC)
    except (TypeError, ValueError):  # a built-in function: torch names the first operand `input`
        return ("input", "self", "other")


def _version(tensor: Tensor) -> int:
    """Returns how often a tensor's memory was written to; 0 where torch does not count (inference mode)."""
    return 0 if tensor.is_inference() else tensor._version


def _memory(tensor: Tensor) -> int:
    """Returns the memory address of a tensor; 0 for a tensor without one (sparse, empty)."""
    try:
        return tensor.untyped_storage().data_ptr()
    except (NotImplementedError, RuntimeError):
        return 0
