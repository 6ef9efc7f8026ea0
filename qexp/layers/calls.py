"""Function calls that carry quantizers: each has a module as its stand-in, under the name that the recorder gives the call.

`x + y` in the `forward` of `layer1.0` is the call `layer1.0.add`; its second sum is `layer1.0.add_1`. The stand-in is a module that
computes the same (`qexp.layers.forms`), so recipes, statistics and quantizers treat it as any layer. Where a stand-in is in use, the
class of the module that makes the call is changed in place to a subclass with another `forward`, as the classes of layers are: it runs
the module's own `forward` under a torch-function mode, which passes those calls to their stand-ins. Calls that other modules make
inside, layers among them, are left alone. A module without a stand-in in use keeps its class and costs nothing.

The state lies in the module that makes the calls: `_calls` describes them; stand-ins in use are submodules, the others plain attributes,
so that a network that goes through its children does not meet them.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache, wraps
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from qexp.errors import QexpError
from qexp.layers.forms import Form, form
from qexp.layers.quantized import ROUTED, Quantized
from qexp.layers.running import RUNNING

CALLS = "_calls"
_KINDS = {
    **dict.fromkeys(("iadd", "radd"), "add"),
    **dict.fromkeys(("isub", "rsub", "subtract"), "sub"),
    **dict.fromkeys(("imul", "rmul", "multiply"), "mul"),
    **dict.fromkeys(("truediv", "itruediv", "divide", "true_divide"), "div"),
    **dict.fromkeys(("concat", "concatenate"), "cat"),
}
_KIND_OF: dict[Callable, str] = {}  # of functions that have been called
_GOES_THROUGH = {"children", "named_children", "modules", "named_modules", "_modules"}


@dataclass
class Call:
    """One function call in the `forward` of a module.

    Attributes:
        kind: Its kind, by which calls are numbered: `add` for `+`, `+=`, `torch.add`.
        number: Its place among the calls of this kind.
        of: How many calls of this kind the module makes; None if that differs from one run of the module to the next.
        form: The class of its stand-in.
        options: Arguments of the last call that are no tensors.
        layer: Name inside the module of the layer whose parameters the call takes, and which is its stand-in then; empty for others.
        read: Whether that layer is in use as the stand-in.
    """

    kind: str
    number: int
    of: int | None
    form: type[nn.Module]
    options: dict[str, Any] = field(default_factory=dict)
    layer: str = ""
    read: bool = False


def function_name(function: Callable) -> str:
    """Returns the name of a function or method; for the getter of a tensor attribute, the name of the attribute."""
    name = getattr(function, "__name__", type(function).__name__)
    return getattr(getattr(function, "__self__", None), "__name__", name) if name == "__get__" else name


def kind_of(name: str) -> str:
    """Returns the kind of a function, by its name: `add` for `add`, `add_`, `__iadd__`."""
    bare = name.strip("_")
    return _KINDS.get(bare, bare)


def local_name(owner: nn.Module, kind: str, number: int) -> str:
    """Returns the name of a call inside its module: its kind and number; never that of another attribute of the module."""
    name = kind + (f"_{number}" if number else "")
    while name not in calls(owner) and _taken(owner, name):
        name += "_"
    return name


def _taken(owner: nn.Module, name: str) -> bool:
    own = vars(owner)
    held = (own, own["_modules"], own["_parameters"], own["_buffers"])
    return hasattr(type(owner), name) or any(name in names for names in held)


def calls(owner: nn.Module) -> dict[str, Call]:
    """Returns the calls of a module that have stand-ins, by local name."""
    return vars(owner).get(CALLS, {})


def stand_in(owner: nn.Module, name: str) -> nn.Module:
    """Returns the stand-in of a call, in use or not."""
    if layer := calls(owner)[name].layer:
        return owner.get_submodule(layer)
    modules = vars(owner)["_modules"]
    return modules[name] if name in modules else vars(owner)[name]


def standing(found: Form) -> nn.Module:
    """Returns a stand-in for a call. Parameters that the call takes belong to the module that makes it: here they are attributes."""
    module = found.module()
    for name, tensor in found.constants.items():
        module._parameters.pop(name, None)
        module._buffers.pop(name, None)
        vars(module)[name] = tensor
    return module


def call_of(owner: nn.Module, module: nn.Module) -> Call | None:
    """Returns the call for which a module stands, None for a module that stands for none."""
    return next((call for name, call in calls(owner).items() if stand_in(owner, name) is module), None)


def install(owner: nn.Module, name: str, call: Call, module: nn.Module | None) -> None:
    """Gives a call of a module its stand-in, which is not in use yet; None where the call names a layer."""
    vars(owner).setdefault(CALLS, {})[name] = call
    if module is not None:
        vars(owner)[name] = module.train(owner.training)


def remove(owner: nn.Module, name: str) -> None:
    """Removes the stand-in of a call."""
    use(owner, [n for n in _in_use(owner) if n != name])
    if not vars(owner)[CALLS].pop(name).layer:
        del vars(owner)[name]


def use(owner: nn.Module, names: list[str]) -> None:
    """Puts these stand-ins of a module's calls into use, and no others."""
    modules = vars(owner)["_modules"]
    for name, call in calls(owner).items():  # in the order of the calls, behind all other modules
        if call.layer:
            call.read = name in names
            continue
        module = modules.pop(name) if name in modules else vars(owner).pop(name)
        if name in names:
            modules[name] = module.train(owner.training)
        else:
            vars(owner)[name] = module
    plain = unrouted(type(owner))
    owner.__class__ = _routed(plain) if names else plain


def use_all(model: nn.Module) -> None:
    """Puts every stand-in of a network's calls into use, in place."""
    for owner in list(model.modules()):
        if calls(owner):
            use(owner, list(calls(owner)))


def use_needed(model: nn.Module) -> None:
    """Puts the stand-ins that carry quantizers, or that something else has replaced, into use, in place, and no others."""
    for owner in list(model.modules()):
        if calls(owner):
            use(owner, [name for name, call in calls(owner).items() if _needed(stand_in(owner, name), call)])


def _needed(module: nn.Module, call: Call) -> bool:
    return type(module) is not call.form or any(isinstance(m, Quantized) for m in module.modules())


@contextmanager
def all_calls(model: nn.Module) -> Iterator[None]:
    """Context manager: every stand-in of the network's calls is in use, so that hooks on it run."""
    before = [(owner, _in_use(owner)) for owner in model.modules() if calls(owner)]
    use_all(model)
    try:
        yield
    finally:
        for owner, names in before:
            use(owner, names)


def _in_use(owner: nn.Module) -> list[str]:
    return [name for name, call in calls(owner).items() if call.read or name in vars(owner)["_modules"]]


def can_route(owner: nn.Module) -> bool:
    """Whether the class of a module can be changed: it computes with the `forward` of its class, and its class allows it."""
    if "forward" in vars(owner) or isinstance(owner, torch.jit.ScriptModule):
        return False
    kind = type(owner)
    try:
        owner.__class__ = _routed(unrouted(kind))
        owner.__class__ = kind
    except TypeError:  # a class with slots or a metaclass of its own
        return False
    return True


def unrouted(kind: type[nn.Module]) -> type[nn.Module]:
    """Returns the class that a module had before its calls were passed to stand-ins."""
    return vars(kind).get(ROUTED, kind)


@cache
def _routed(kind: type[nn.Module]) -> type[nn.Module]:
    named = {"__module__": kind.__module__, "__qualname__": kind.__qualname__, "__doc__": kind.__doc__}
    own = {ROUTED: kind, "_hides": _goes_through_children(kind), "forward": _routing(kind.forward)}
    return type(kind)(kind.__name__, (Routed, kind), named | own)


def _routing(forward: Callable[..., Any]) -> Callable[..., Any]:
    """Returns a `forward` with the signature of a class's own, which runs that one under the mode."""

    @wraps(forward)
    def routed(self: Routed, *args: Any, **kwargs: Any) -> Any:
        return (_uncompiled if torch.compiler.is_compiling() else _run)(self, args, kwargs)

    return routed


def _goes_through_children(kind: type[nn.Module]) -> bool:
    code = getattr(kind.forward, "__code__", None)
    named = set(code.co_names) if code is not None else set()
    return issubclass(kind, nn.Sequential | nn.ModuleList | nn.ModuleDict) or bool(named & _GOES_THROUGH)


class Routed(nn.Module):
    """A module with calls that are passed to their stand-ins; only `use` makes one."""

    def __reduce_ex__(self, protocol: int) -> Any:
        """Pickles and copies the module by its own class, which the copy changes again."""
        maker, args, *rest = super().__reduce_ex__(protocol)
        if not args or args[0] is not type(self):
            raise TypeError(f"{type(self).__name__} cannot be copied: it says itself how, and its calls have stand-ins")
        return (_remade, (unrouted(type(self)), maker, args[1:]), *rest)


def _remade(kind: type[nn.Module], maker: Callable[..., Any], args: tuple) -> nn.Module:
    return maker(_routed(kind), *args)


def _run(module: Routed, args: tuple, kwargs: dict[str, Any]) -> Any:
    with _Mode(module):
        return getattr(type(module), ROUTED).forward(module, *args, **kwargs)  # its class may be a proxy of a tracer


# calls are found on Python's stack, which a compiled network does not have; this part of it stays as it is
_uncompiled = torch._disable_dynamo(_run)
_OWN = _run.__code__
_OTHERS = nn.Module._call_impl.__code__


class _Mode(TorchFunctionMode):
    """Passes the calls of one running module to their stand-ins."""

    def __init__(self, owner: nn.Module) -> None:
        super().__init__()
        self.owner = owner
        self.modules = dict(vars(owner)["_modules"])
        self.routes = {(c.kind, c.number): n for n, c in calls(owner).items() if c.read or n in self.modules}
        self.own = [n for n in self.routes.values() if n in self.modules]
        self.counts = dict.fromkeys((kind for kind, _ in self.routes), 0)

    def __enter__(self) -> _Mode:
        if type(self.owner)._hides:
            own = {n: self.modules[n] for n in self.own}
            vars(self.owner)["_modules"] = {n: m for n, m in self.modules.items() if n not in own}
            vars(self.owner).update(own)
        RUNNING.modes.append(self)
        return super().__enter__()

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        super().__exit__(kind, error, trace)
        RUNNING.modes.pop()
        if type(self.owner)._hides:
            for name in self.own:
                vars(self.owner).pop(name, None)
            vars(self.owner)["_modules"] = self.modules
        if kind is None and not RUNNING.reading:
            self._check_counts()

    def __torch_function__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kind = _KIND_OF.get(func)
        if kind is None:
            kind = _KIND_OF[func] = kind_of(function_name(func))
        if kind not in self.counts or RUNNING.modes[-1] is not self or not _made_here():
            return func(*args, **(kwargs or {}))
        number = self.counts[kind]
        self.counts[kind] = number + 1
        local = self.routes.get((kind, number))
        return func(*args, **(kwargs or {})) if local is None else self._pass(local, func, args, kwargs or {})

    def _pass(self, local: str, func: Callable, args: tuple, kwargs: dict) -> Any:
        call, found = calls(self.owner)[local], form(function_name(func), args, kwargs)
        if found is None or found.kind is not call.form:
            if RUNNING.reading:
                return func(*args, **kwargs)
            raise QexpError(
                f"{type(self.owner).__name__}: its call {local} is no {call.form.__name__} here as it was when the network was read; "
                "write it so that it makes the same calls for all images, in training too, or leave the call in float with a rule"
            )
        if call.layer:
            return _with_bias(self.owner.get_submodule(call.layer), found)
        module = self.modules[local]
        if found.constants and isinstance(module, call.form):
            vars(module).update(found.constants)
        if not _alike(found.options, call.options):
            follow(module, found)
            call.options = found.options
        return module(*found.operands)

    def _check_counts(self) -> None:
        for local in self.routes.values():
            call = calls(self.owner)[local]
            made = self.counts[call.kind]
            if call.of is not None and made != call.of:
                raise QexpError(
                    f"{type(self.owner).__name__}: it makes {made} calls of {call.kind} here and made {call.of} when the network was "
                    f"read, so {local} is not known; write it so that it makes the same calls for all images, in training too, or leave "
                    "the call in float with a rule"
                )


def _with_bias(layer: nn.Module, found: Form) -> Any:
    """Returns the result of a layer with the bias that the call takes, which may be a copy through which gradients pass in part.

    A call without a bias leaves the layer its own: batch norm may have been folded into it.
    """
    own, given = layer._parameters.get("bias"), found.constants.get("bias")
    if given is None or given is own:
        return layer(*found.operands)
    layer._parameters["bias"] = given
    try:
        return layer(*found.operands)
    finally:
        layer._parameters["bias"] = own


def follow(module: nn.Module, found: Form) -> None:
    """Gives a stand-in the arguments of a call that has others than the last one (a size that depends on the images)."""
    for name, value in found.options.items():
        if isinstance(value, Tensor):
            vars(module)[name] = value
        else:
            setattr(module, name, value)


def _alike(a: dict[str, Any], b: dict[str, Any]) -> bool:
    return a.keys() == b.keys() and all(
        v is b[k] or (not isinstance(v, Tensor) and not isinstance(b[k], Tensor) and v == b[k]) for k, v in a.items()
    )


def _made_here() -> bool:
    """Whether a call comes from the running module's own `forward`, not from a module that it calls."""
    frame = sys._getframe(2)
    while frame is not None:
        code = frame.f_code
        if code is _OTHERS:
            return False
        if code is _OWN:
            return True
        frame = frame.f_back
    return False
