"""The module that computes the same as a function call: `x + y` is an `Add`, `F.relu(x)` a `nn.ReLU`, `x.mean((2, 3))` a `Mean`.

Each part that treats layers by their type treats function calls so, too:

* A call with a name of its own (`layer1.0.add`) gets this module as its stand-in, and carries quantizers there (`qexp.layers.calls`).
* An integer rule is chosen by this module's type. A rule for `nn.Sigmoid` in `qexp.integer.layers` serves the module and every
  `torch.sigmoid(x)`, `F.sigmoid(x)`, `x.sigmoid()`: it is called as `rule(walk, step, name, layer, *values)`, where `layer` is the module
  of the network or the one made here, and its attributes (`dim`, `output_size`, `dims`, `inplace`) are the arguments of the call. Its
  values are those of the step's operands, in order. A rule may return a tuple of values, one per result (`Split`). Arguments that
  depend on the batch size stay `qexp.network.graph.PerImage`. A constant tensor of a sum or product is in the module (`Affine`).

The types, of `qexp.models.modules`, `qexp.models.operations` and `qexp.models.attention`, by function: `Add Subtract Multiply Divide
MatMul` (two tensors), `Affine` (`+ - * /` with a number or a constant tensor), `Elementwise` (`abs`, `exp`, `**`), `Concat Stack Mean
Sum Length UnitLength Permute Transpose Reshape Split Index Squeeze Roll Pad Attention`, and torch's activations (`Hardtanh` for clamps),
`Softmax Flatten Unflatten AdaptiveAvgPool2d AvgPool2d MaxPool2d Upsample PixelShuffle PixelUnshuffle ChannelShuffle LayerNorm BatchNorm2d
Conv2d Linear`, `Identity` for what does nothing in evaluation mode.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from qexp.models import operations
from qexp.models.attention import Attention
from qexp.models.modules import Add, Concat
from qexp.models.operations import (
    Affine,
    Divide,
    Elementwise,
    Index,
    Length,
    MatMul,
    Mean,
    Multiply,
    Pad,
    Permute,
    Reshape,
    Roll,
    Split,
    Squeeze,
    Stack,
    Subtract,
    Sum,
    Transpose,
    UnitLength,
)

_MISSING = object()
_INTO = {"add_", "__iadd__", "sub_", "__isub__", "mul_", "__imul__", "div_", "__itruediv__"}


@dataclass(frozen=True)
class Form:
    """A function call as a call of a module.

    Attributes:
        kind: The module's class.
        operands: The tensors that it takes.
        options: Arguments of the class.
        constants: Parameters of the module that the call takes as arguments (the weight of `F.linear`).
    """

    kind: type[nn.Module]
    operands: tuple[Any, ...]
    options: dict[str, Any] = field(default_factory=dict)
    constants: dict[str, Tensor | None] = field(default_factory=dict)

    def module(self) -> nn.Module:
        """Returns a new module that computes what the call computes."""
        if not self.constants:
            return self.kind(**self.options)
        with torch.device("meta"):  # the parameters are replaced, so they need no memory
            module = self.kind(**self.options)
        for name, tensor in self.constants.items():
            if name in module._buffers:
                module._buffers[name] = tensor
            elif tensor is None:
                module.register_parameter(name, None)
            else:
                given = tensor if isinstance(tensor, nn.Parameter) else nn.Parameter(tensor, requires_grad=False)
                module.register_parameter(name, given)
        for name, buffer in module._buffers.items():
            # No argument of the call gives a batch norm's count of batches.
            if buffer is not None and buffer.device.type == "meta":
                module._buffers[name] = torch.zeros(buffer.shape, dtype=buffer.dtype)
        return module.eval()


# classes of this module's making that are one step of a network
STEPS = (Add, Affine, Concat, Divide, MatMul, Mean, Multiply, Stack, Subtract, Sum)


def form(function: str, args: tuple, kwargs: dict[str, Any], tensors: tuple[type, ...] = (Tensor,)) -> Form | None:
    """Returns a call as a call of a module; None where there is no module for it, or not with these arguments.

    Args:
        function: The function's name: that of `torch`, of `torch.nn.functional`, of a method or of an operator (`__iadd__`).
        args, kwargs: Its arguments.
        tensors: Types of arguments that are tensors; a recorded call has references to tensors.
    """
    maker = _FORMS.get(function)
    if maker is None or kwargs.get("out") is not None:
        return None
    try:
        found = maker(_Given(args, kwargs, tensors))
    except _Unlike:
        return None
    if function not in _INTO:
        return found
    if found.kind is Add:
        return replace(found, kind=operations.Add)
    return replace(found, options=found.options | {"into": True})


class _Unlike(Exception):
    """The call has arguments that the module does not have."""


@dataclass
class _Given:
    """The arguments of a call."""

    args: tuple
    kwargs: dict[str, Any]
    types: tuple[type, ...]

    def __call__(self, position: int, name: str, default: Any = _MISSING) -> Any:
        """Returns an argument that is passed by position or by name."""
        if len(self.args) > position:
            return self.args[position]
        if name not in self.kwargs and default is _MISSING:
            raise _Unlike
        return self.kwargs.get(name, default)

    def tensor(self, position: int = 0, name: str = "input") -> Any:
        """Returns an argument that is a tensor which the network computes."""
        value = self(position, name, self.kwargs.get("self"))
        if not self.is_tensor(value):
            raise _Unlike
        return value

    def is_tensor(self, value: Any) -> bool:
        """Whether a value is a tensor or a reference to one."""
        return isinstance(value, self.types)

    def rest(self, position: int, name: str) -> tuple:
        """Returns sizes that are passed one by one or as one sequence."""
        if name in self.kwargs:
            found = self.kwargs[name]
        else:
            found = self.args[position:]
            if len(found) == 1 and isinstance(found[0], tuple | list):
                found = found[0]
        return tuple(found) if isinstance(found, tuple | list) else (found,)


def _constant(value: Any) -> bool:
    return isinstance(value, bool | int | float | Tensor)


def _binary(kind: type[nn.Module], affine: Callable[[Any], dict[str, Any]] | None, swapped: bool = False) -> Callable:
    """Returns the form of a function of two tensors, or of one tensor and a constant."""

    def make(given: _Given) -> Form:
        a, b = given(0, "input", given.kwargs.get("self", _MISSING)), given(1, "other")
        if given(2, "alpha", 1) != 1 or given.kwargs.get("rounding_mode") is not None:
            raise _Unlike
        if swapped:
            a, b = b, a
        networks = [given.is_tensor(x) and not isinstance(x, nn.Parameter) for x in (a, b)]
        if all(networks):
            return Form(kind, (a, b))
        if affine is None or not any(networks):
            raise _Unlike
        x, constant = (a, b) if networks[0] else (b, a)
        if not _constant(constant):
            raise _Unlike
        if kind is Subtract and not networks[0]:  # constant - x
            return Form(Affine, (x,), {"factor": -1.0, "summand": constant})
        return Form(Affine, (x,), affine(constant))

    return make


def _divide(given: _Given) -> Form:
    x, by = given.tensor(), given(1, "other")
    if given.kwargs.get("rounding_mode"):
        raise _Unlike
    if given.is_tensor(by) and not isinstance(by, nn.Parameter):
        return Form(Divide, (x, by))
    if not _constant(by):
        raise _Unlike
    return Form(Affine, (x,), {"factor": 1 / by, "divisor": by})


def _matmul(given: _Given) -> Form:
    a, b = given.tensor(), given(1, "other", given.kwargs.get("mat2", _MISSING))
    if not given.is_tensor(b) or isinstance(b, nn.Parameter):
        raise _Unlike
    return Form(MatMul, (a, b))


def _einsum(given: _Given) -> Form:
    """Returns the form of a sum over one index of two tensors whose other dimensions come first in both: a product of matrices."""
    equation, *xs = given.args
    xs = list(xs[0]) if len(xs) == 1 and isinstance(xs[0], tuple | list) else xs
    if not isinstance(equation, str) or len(xs) != 2 or not all(map(given.is_tensor, xs)):
        raise _Unlike
    if any(isinstance(x, nn.Parameter) for x in xs):
        raise _Unlike
    said, arrow, result = equation.replace(" ", "").partition("->")
    letters = said.split(",")
    if not arrow or any(
        word[:-2] != result[:-2] or len(word) < 2 or len({*word}) < len(word) for word in (*letters, result)
    ):
        raise _Unlike
    if result[-2] not in letters[0][-2:]:
        letters, xs = letters[::-1], xs[::-1]
    (row, column), (first, second) = result[-2:], (word[-2:] for word in letters)
    inner = {*first} - {row}
    if row not in first or column not in second or {*second} - {column} != inner or column in first:
        raise _Unlike
    return Form(MatMul, tuple(xs), {"turned": (first[0] != row, second[1] != column)})


def _stack(given: _Given) -> Form:
    xs = given(0, "tensors")
    if not isinstance(xs, tuple | list) or not all(map(given.is_tensor, xs)):
        raise _Unlike
    return Form(Stack, tuple(xs), {"dim": given(1, "dim", 0)})


def _concat(given: _Given) -> Form:
    xs = given(0, "tensors")
    if not isinstance(xs, tuple | list) or not all(map(given.is_tensor, xs)):
        raise _Unlike
    return Form(Concat, tuple(xs), {"dim": given(1, "dim", given.kwargs.get("axis", 0))})


def _activation(kind: type[nn.Module], *options: tuple[str, Any], inplace: bool | None = None) -> Callable:
    """Returns the form of a function of one tensor; `options` follow it, with their defaults; `inplace`: whether it is such a form."""

    def make(given: _Given) -> Form:
        said = {name: given(i, name, default) for i, (name, default) in enumerate(options, 1)}
        if inplace:
            said["inplace"] = True
        return Form(kind, (given.tensor(),), said)

    return make


def _reduction(kind: type[nn.Module]) -> Callable:
    def make(given: _Given) -> Form:
        dims = given(1, "dim", None)
        if dims is None or given.kwargs.get("dtype") is not None or given.kwargs.get("axis") is not None:
            raise _Unlike
        dims = (dims,) if isinstance(dims, int) else tuple(dims)
        return Form(kind, (given.tensor(),), {"dims": dims, "keepdim": bool(given(2, "keepdim", False))})

    return make


def _clamp(*ends: str, inplace: bool = False) -> Callable:
    """Returns the form of a clamp between two numbers, or at one; `ends` names the arguments after the tensor."""

    def make(given: _Given) -> Form:
        said = {end: given(i, end, None) for i, end in enumerate(ends, 1)}
        low, high = said.get("min"), said.get("max")
        low, high = -math.inf if low is None else low, math.inf if high is None else high
        if not isinstance(low, int | float) or not isinstance(high, int | float) or not low < high:
            raise _Unlike
        return Form(nn.Hardtanh, (given.tensor(),), {"min_val": low, "max_val": high, "inplace": inplace})

    return make


def _elementwise(function: str, *numbers: str) -> Callable:
    """Returns the form of a function of each element, and of numbers after it."""

    def make(given: _Given) -> Form:
        said = tuple(given(i, name) for i, name in enumerate(numbers, 1))
        if not all(isinstance(number, int | float) for number in said):
            raise _Unlike
        return Form(Elementwise, (given.tensor(),), {"function": function, "numbers": said})

    return make


def _length(vector: bool) -> Callable:
    """Returns the form of a norm: of `torch.linalg.vector_norm`, or of `torch.norm`, whose arguments have other names."""

    def make(given: _Given) -> Form:
        power, dims, keepdim = given(1, "ord" if vector else "p", 2), given(2, "dim", None), given(3, "keepdim", False)
        if power not in (2, "fro") or dims is None or given.kwargs.get("dtype") is not None:
            raise _Unlike
        dims = (dims,) if isinstance(dims, int) else tuple(dims)
        return Form(Length, (given.tensor(0, "x" if vector else "input"),), {"dims": dims, "keepdim": bool(keepdim)})

    return make


def _add_product(given: _Given) -> Form:
    """Returns the form of `summand + value * factor * x` with a constant summand and a constant factor."""
    summand, a, b, value = given(0, "input"), given(1, "tensor1"), given(2, "tensor2"), given(3, "value", 1)
    x, factor = (a, b) if given.is_tensor(a) else (b, a)
    if not given.is_tensor(x) or any(given.is_tensor(c) or not _constant(c) for c in (summand, factor)):
        raise _Unlike
    return Form(Affine, (x,), {"factor": factor * value, "summand": summand})


def _unit_length(given: _Given) -> Form:
    power, dim = given(1, "p", 2.0), given(2, "dim", 1)
    if power != 2 or not isinstance(dim, int):
        raise _Unlike
    return Form(UnitLength, (given.tensor(),), {"dim": dim, "eps": given(3, "eps", 1e-12)})


def _negative(given: _Given) -> Form:
    return Form(Affine, (given.tensor(),), {"factor": -1.0})


def _unflatten(given: _Given) -> Form:
    dim, sizes = given(1, "dim"), given(2, "sizes", given.kwargs.get("unflattened_size", _MISSING))
    if not isinstance(sizes, tuple | list) or not all(isinstance(size, int) for size in sizes):
        raise _Unlike
    return Form(nn.Unflatten, (given.tensor(),), {"dim": dim, "unflattened_size": tuple(sizes)})


def _flatten(given: _Given) -> Form:
    return Form(
        nn.Flatten,
        (given.tensor(),),
        {"start_dim": given(1, "start_dim", 0), "end_dim": given(2, "end_dim", -1)},
    )


def _permute(given: _Given) -> Form:
    return Form(Permute, (given.tensor(),), {"dims": given.rest(1, "dims")})


def _transpose(given: _Given) -> Form:
    return Form(Transpose, (given.tensor(),), {"dims": (given(1, "dim0"), given(2, "dim1"))})


def _reshape(name: str) -> Callable:
    def make(given: _Given) -> Form:
        sizes = given.rest(1, name)
        if any(isinstance(size, torch.dtype) for size in sizes):
            raise _Unlike
        return Form(Reshape, (given.tensor(),), {"sizes": sizes})

    return make


def _split(name: str) -> Callable:
    def make(given: _Given) -> Form:
        sizes = given(1, name, given.kwargs.get("split_size_or_sections", _MISSING))
        sizes = tuple(sizes) if isinstance(sizes, tuple | list) else sizes
        return Form(Split, (given.tensor(0, "tensor"),), {"sizes": sizes, "dim": given(2, "dim", 0)})

    return make


def _chunk(given: _Given) -> Form:
    return Form(Split, (given.tensor(),), {"parts": given(1, "chunks"), "dim": given(2, "dim", 0)})


def _index(given: _Given) -> Form:
    index = given(1, "index")
    if any(map(given.is_tensor, index if isinstance(index, tuple | list) else [index])):
        raise _Unlike
    return Form(Index, (given.tensor(),), {"index": index})


def _unsqueeze(given: _Given) -> Form:
    dim = given(1, "dim")
    before = (slice(None),) * dim if dim >= 0 else (Ellipsis,)
    return Form(Index, (given.tensor(),), {"index": (*before, None, *(slice(None),) * (-1 - dim))})


def _squeeze(given: _Given) -> Form:
    dims = given(1, "dim")  # without it, a batch of one image would lose its dimension
    return Form(Squeeze, (given.tensor(),), {"dims": (dims,) if isinstance(dims, int) else tuple(dims)})


def _roll(given: _Given) -> Form:
    shifts, dims = given(1, "shifts"), given(2, "dims", ())
    shifts, dims = ((v,) if isinstance(v, int) else tuple(v) for v in (shifts, dims))
    if not dims:  # of the flattened tensor
        raise _Unlike
    return Form(Roll, (given.tensor(),), {"shifts": shifts, "dims": dims})


def _pad(given: _Given) -> Form:
    options = {"sizes": tuple(given(1, "pad")), "mode": given(2, "mode", "constant"), "value": given(3, "value", None)}
    return Form(Pad, (given.tensor(),), options)


def _pool(kind: type[nn.Module], *options: tuple[str, Any], first: str = "kernel_size") -> Callable:
    def make(given: _Given) -> Form:
        said = {first: given(1, first)} | {name: given(i, name, value) for i, (name, value) in enumerate(options, 2)}
        if given.kwargs.get("return_indices"):
            raise _Unlike
        if said.get("stride", _MISSING) in ([], ()):
            said["stride"] = None
        return Form(kind, (given.tensor(),), said)

    return make


def _upsample(given: _Given) -> Form:
    if given(6, "antialias", False):
        raise _Unlike
    names = (("size", None), ("scale_factor", None), ("mode", "nearest"), ("align_corners", None))
    names += (("recompute_scale_factor", None),)
    said = {name: given(i, name, default) for i, (name, default) in enumerate(names, 1)}
    size = said["size"]
    said["size"] = tuple(size) if isinstance(size, list | tuple) else size
    return Form(nn.Upsample, (given.tensor(),), said)


def _group_norm(given: _Given) -> Form:
    weight, bias = given(2, "weight", None), given(3, "bias", None)
    if not isinstance(weight, Tensor) or not isinstance(bias, Tensor):
        raise _Unlike
    options = {"num_groups": given(1, "num_groups"), "num_channels": weight.numel(), "eps": given(4, "eps", 1e-5)}
    return Form(nn.GroupNorm, (given.tensor(),), options, {"weight": weight, "bias": bias})


def _layer_norm(given: _Given) -> Form:
    shape, weight, bias = tuple(given(1, "normalized_shape")), given(2, "weight", None), given(3, "bias", None)
    options = {"normalized_shape": shape, "eps": given(4, "eps", 1e-5)}
    return Form(nn.LayerNorm, (given.tensor(),), options, {"weight": weight, "bias": bias})


def _batch_norm(given: _Given) -> Form:
    mean, var = given(1, "running_mean"), given(2, "running_var")
    if given(5, "training", False) or not isinstance(mean, Tensor):
        raise _Unlike
    constants = {"weight": given(3, "weight", None), "bias": given(4, "bias", None)}
    options = {"num_features": len(mean), "eps": given(7, "eps", 1e-5)}
    return Form(nn.BatchNorm2d, (given.tensor(),), options, {**constants, "running_mean": mean, "running_var": var})


def _linear(given: _Given) -> Form:
    weight, bias = given(1, "weight"), given(2, "bias", None)
    if not isinstance(weight, Tensor):
        raise _Unlike
    options = {"in_features": weight.shape[1], "out_features": weight.shape[0], "bias": bias is not None}
    return Form(nn.Linear, (given.tensor(),), options, {"weight": weight, "bias": bias})


def _conv(given: _Given) -> Form:
    weight, bias, groups = given(1, "weight"), given(2, "bias", None), given(6, "groups", 1)
    if not isinstance(weight, Tensor) or weight.ndim != 4:
        raise _Unlike
    names = (("stride", 1), ("padding", 0), ("dilation", 1))
    options = {name: given(i, name, default) for i, (name, default) in enumerate(names, 3)}
    sizes = {"in_channels": weight.shape[1] * groups, "out_channels": weight.shape[0]}
    options |= {"kernel_size": tuple(weight.shape[2:]), "groups": groups, "bias": bias is not None}
    return Form(nn.Conv2d, (given.tensor(),), sizes | options, {"weight": weight, "bias": bias})


def _attention(given: _Given) -> Form:
    q, k, v = (given.tensor(i, name) for i, name in enumerate(("query", "key", "value")))
    mask = given(3, "attn_mask", None)
    if mask is not None and not isinstance(mask, Tensor):
        raise _Unlike
    options = {"mask": mask, "causal": given(5, "is_causal", False), "dropout": given(4, "dropout_p", 0.0)}
    options |= {"scale": given(6, "scale", None), "grouped": given(7, "enable_gqa", False)}
    return Form(Attention, (q, k, v), options)


def _prelu(given: _Given) -> Form:
    weight = given(1, "weight")
    if not isinstance(weight, Tensor) or weight.ndim > 1:
        raise _Unlike
    return Form(nn.PReLU, (given.tensor(),), {"num_parameters": weight.numel()}, {"weight": weight})


def _nothing(given: _Given) -> Form:
    return Form(nn.Identity, (given.tensor(),))


def _dropout(given: _Given) -> Form:
    if given(2, "training", given.kwargs.get("train", True)):
        raise _Unlike
    return _nothing(given)


def _forms() -> dict[str, Callable[[_Given], Form]]:
    add, multiply = (lambda c: {"summand": c}), (lambda c: {"factor": c})
    subtract = lambda c: {"summand": -c}  # noqa: E731 - one of three
    found: dict[str, Callable] = {
        **dict.fromkeys(("add", "add_", "__add__", "__iadd__"), _binary(Add, add)),
        "__radd__": _binary(Add, add, swapped=True),
        **dict.fromkeys(("sub", "sub_", "subtract", "__sub__", "__isub__"), _binary(Subtract, subtract)),
        **dict.fromkeys(("rsub", "__rsub__"), _binary(Subtract, subtract, swapped=True)),
        **dict.fromkeys(("mul", "mul_", "multiply", "__mul__", "__imul__"), _binary(Multiply, multiply)),
        "__rmul__": _binary(Multiply, multiply, swapped=True),
        **dict.fromkeys(("div", "div_", "divide", "true_divide", "__truediv__", "__div__", "__itruediv__"), _divide),
        **dict.fromkeys(("matmul", "__matmul__", "bmm"), _matmul),
        "einsum": _einsum,
        **dict.fromkeys(("cat", "concat", "concatenate"), _concat),
        "relu": _activation(nn.ReLU, ("inplace", False)),
        "relu_": _activation(nn.ReLU, inplace=True),
        "relu6": _activation(nn.ReLU6, ("inplace", False)),
        "silu": _activation(nn.SiLU, ("inplace", False)),
        "hardswish": _activation(nn.Hardswish, ("inplace", False)),
        "hardsigmoid": _activation(nn.Hardsigmoid, ("inplace", False)),
        "leaky_relu": _activation(nn.LeakyReLU, ("negative_slope", 0.01), ("inplace", False)),
        "leaky_relu_": _activation(nn.LeakyReLU, ("negative_slope", 0.01), inplace=True),
        "prelu": _prelu,
        "elu": _activation(nn.ELU, ("alpha", 1.0), ("inplace", False)),
        "elu_": _activation(nn.ELU, ("alpha", 1.0), inplace=True),
        "mish": _activation(nn.Mish, ("inplace", False)),
        "celu": _activation(nn.CELU, ("alpha", 1.0), ("inplace", False)),
        "selu": _activation(nn.SELU, ("inplace", False)),
        "hardtanh": _activation(nn.Hardtanh, ("min_val", -1.0), ("max_val", 1.0), ("inplace", False)),
        **dict.fromkeys(("clamp", "clip"), _clamp("min", "max")),
        **dict.fromkeys(("clamp_", "clip_"), _clamp("min", "max", inplace=True)),
        "clamp_min": _clamp("min"),
        "clamp_max": _clamp("max"),
        **dict.fromkeys(
            ("threshold", "_threshold"),
            _activation(nn.Threshold, ("threshold", _MISSING), ("value", _MISSING), ("inplace", False)),
        ),
        "hardshrink": _activation(nn.Hardshrink, ("lambd", 0.5)),
        "softshrink": _activation(nn.Softshrink, ("lambd", 0.5)),
        "tanhshrink": _activation(nn.Tanhshrink),
        "softsign": _activation(nn.Softsign),
        "log_sigmoid": _activation(nn.LogSigmoid),
        "softplus": _activation(nn.Softplus, ("beta", 1.0), ("threshold", 20.0)),
        "sigmoid": _activation(nn.Sigmoid),
        "tanh": _activation(nn.Tanh),
        "gelu": _activation(nn.GELU, ("approximate", "none")),
        **{name: _elementwise(name) for name in Elementwise.KNOWN if name != "pow"},
        **dict.fromkeys(("absolute", "__abs__"), _elementwise("abs")),
        **dict.fromkeys(("pow", "__pow__"), _elementwise("pow", "exponent")),
        **dict.fromkeys(("neg", "negative", "__neg__"), _negative),
        "softmax": _activation(nn.Softmax, ("dim", None)),
        "normalize": _unit_length,
        "norm": _length(vector=False),
        "linalg_vector_norm": _length(vector=True),
        "vector_norm": _length(vector=True),
        "addcmul": _add_product,
        "mean": _reduction(Mean),
        "sum": _reduction(Sum),
        "stack": _stack,
        "flatten": _flatten,
        "unflatten": _unflatten,
        "permute": _permute,
        **dict.fromkeys(("transpose", "swapaxes", "swapdims"), _transpose),
        "view": _reshape("size"),
        "reshape": _reshape("shape"),
        "split": _split("split_size"),
        "split_with_sizes": _split("split_sizes"),
        "chunk": _chunk,
        "__getitem__": _index,
        "unsqueeze": _unsqueeze,
        "squeeze": _squeeze,
        "pad": _pad,
        "roll": _roll,
        "pixel_shuffle": _pool(nn.PixelShuffle, first="upscale_factor"),
        "pixel_unshuffle": _pool(nn.PixelUnshuffle, first="downscale_factor"),
        **dict.fromkeys(("channel_shuffle", "native_channel_shuffle"), _pool(nn.ChannelShuffle, first="groups")),
        "adaptive_avg_pool2d": _pool(nn.AdaptiveAvgPool2d, first="output_size"),
        "avg_pool2d": _pool(
            nn.AvgPool2d,
            *(("stride", None), ("padding", 0), ("ceil_mode", False), ("count_include_pad", True)),
            ("divisor_override", None),
        ),
        **dict.fromkeys(
            ("max_pool2d",),
            _pool(nn.MaxPool2d, ("stride", None), ("padding", 0), ("dilation", 1), ("ceil_mode", False)),
        ),
        "interpolate": _upsample,
        "layer_norm": _layer_norm,
        "group_norm": _group_norm,
        "batch_norm": _batch_norm,
        "linear": _linear,
        "conv2d": _conv,
        **dict.fromkeys(("contiguous", "clone", "detach"), _nothing),
        "dropout": _dropout,
        "scaled_dot_product_attention": _attention,
    }
    return found


_FORMS = _forms()
