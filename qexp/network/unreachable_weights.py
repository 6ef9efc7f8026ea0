"""Counts products that cannot be quantized: multiplications by weights outside their own layer, and any others between layers."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from qexp.layers.quantized import QUANTIZED, float_class
from qexp.network.graph import tensors

_ATTENTION = ("multi_head_attention_forward", "_native_multi_head_attention", "_transformer_encoder_layer_fwd")
_RECURRENT = ("lstm", "gru", "rnn_tanh", "rnn_relu", "lstm_cell", "gru_cell", "rnn_tanh_cell", "rnn_relu_cell")


class Products:
    """Tracks which tensors depend on the images and which on weights alone, and counts the products between them.

    A product counts where a factor depends on the images and no layer of a known type is running. If the other factor is computed from
    weights, the layer that holds these weights is listed in `strays`. Examples: attention modules read the weights of a linear layer
    that they never call; a subclass of a convolution computes more than the quantized convolution does; a weight is standardised first.
    Parameters that are only added (position embeddings) are ignored.

    Attributes:
        strays: Multiply-accumulates of the whole batch with weights that cannot be quantized, by the layer's name and type.
        others: Multiply-accumulates without weights (of activations, or by fixed filters), by module and function.
    """

    def __init__(self, model: nn.Module) -> None:
        self.holders: dict[int, list[tuple[str, nn.Module]]] = {}
        for name, module in model.named_modules():
            for parameter in module._parameters.values():
                if parameter is not None:
                    self.holders.setdefault(id(parameter), []).append((name, module))
        self.model = model
        self.strays: dict[str, int] = {}
        self.others: dict[str, int] = {}
        self._images: set[int] = set()
        self._weights: dict[int, int] = {}  # by tensor computed from weights alone: the parameter it comes from

    def image(self, made: list[Tensor]) -> None:
        """Marks tensors that depend on the images."""
        self._images.update(map(id, made))

    def is_image(self, tensor: Tensor) -> bool:
        """Returns whether a tensor depends on the images."""
        return id(tensor) in self._images

    def through(self, given: list[Tensor], made: list[Tensor]) -> None:
        """Marks the results of a call by what its arguments depend on."""
        if any(map(self.is_image, given)):
            self.image(made)
            return
        origin = next((o for o in map(self._origin, given) if o is not None), None)
        for tensor in made if origin is not None else ():
            self._weights[id(tensor)] = origin

    def _origin(self, tensor: Tensor) -> int | None:
        return id(tensor) if id(tensor) in self.holders else self._weights.get(id(tensor))

    def count(self, function: str, args: tuple, kwargs: dict, out: Any, where: str) -> None:
        """Counts a call outside the known layers, if it is a product with a factor that depends on the images."""
        macs = _MACS.get(function)
        given = tensors((args, kwargs))
        if macs is None or not any(map(self.is_image, given)):
            return
        number = macs(args, kwargs, tensors(out))
        weights = {self._origin(t): None for t in given if t.ndim > 1 and not self.is_image(t)}
        names = [self._stray(origin) for origin in weights if origin is not None]
        key = f"{where or type(self.model).__name__} ({function})"
        into = self.strays if names else self.others
        for name in names or [key]:
            into[name] = into.get(name, 0) + number // max(len(names), 1)

    def unseen(self, name: str, module: nn.Module) -> None:
        """Counts a compiled module, whose products cannot be recorded: at least one per weight."""
        weights = sum(p.numel() for p in module.parameters() if p.ndim > 1)
        if weights:
            key = f"{name} ({type(module).__name__})"
            self.strays[key] = self.strays.get(key, 0) + weights

    def _stray(self, origin: int) -> str:
        name, module = self.holders[origin][0]
        bypassed = ": its weight is read without calling the layer" if float_class(module) in QUANTIZED else ""
        kind = float_class(module).__name__
        return f"{name or type(self.model).__name__} ({kind}){bypassed}"


def _named(args: tuple, kwargs: dict, *names: str) -> list[Any]:
    """Returns arguments by position or by name."""
    return [args[i] if len(args) > i else kwargs.get(name) for i, name in enumerate(names)]


def _conv(args: tuple, kwargs: dict, out: list[Tensor]) -> int:
    _, weight = _named(args, kwargs, "input", "weight")
    return out[0].numel() * math.prod(weight.shape[1:])


def _transposed(args: tuple, kwargs: dict, out: list[Tensor]) -> int:
    x, weight = _named(args, kwargs, "input", "weight")
    return x.numel() * math.prod(weight.shape[1:])


def _matmul(args: tuple, kwargs: dict, out: list[Tensor]) -> int:
    first = tensors((args, kwargs))[0]
    return out[0].numel() * first.shape[-1]


def _addmm(args: tuple, kwargs: dict, out: list[Tensor]) -> int:
    return out[0].numel() * tensors((args, kwargs))[1].shape[-1]


def _bilinear(args: tuple, kwargs: dict, out: list[Tensor]) -> int:
    a, b = tensors((args, kwargs))[:2]
    return out[0].numel() * a.shape[-1] * b.shape[-1]


def _einsum(args: tuple, kwargs: dict, out: list[Tensor]) -> int:
    given = tensors((args, kwargs))
    if not isinstance(args[0], str):
        return max(t.numel() for t in (*given, *out))
    terms = args[0].replace(" ", "").split("->")[0].split(",")
    sizes: dict[str, int] = {}
    for term, tensor in zip(terms, given):
        before, dots, after = term.partition("...")
        rest = tensor.shape[len(before) : tensor.ndim - len(after)] if dots else ()
        sizes |= dict(zip(before, tensor.shape)) | dict(zip(after, tensor.shape[tensor.ndim - len(after) :]))
        sizes["..."] = max(sizes.get("...", 1), math.prod(rest))
    return math.prod(sizes.values())


def _scaled_dot_product(args: tuple, kwargs: dict, out: list[Tensor]) -> int:
    query, key = tensors((args, kwargs))[:2]
    return (query.numel() + out[0].numel()) * key.shape[-2]


def _attention(args: tuple, kwargs: dict, out: list[Tensor]) -> int:
    given = tensors((args, kwargs))
    query, key = given[0], given[1]
    width, positions = query.shape[-1], key.numel() // key.shape[-1]
    rows = query.numel() // width
    batch = query.shape[1] if query.ndim == 3 else 1
    return 2 * rows * width * width + 2 * positions * width * width + 2 * rows * positions // batch * width


def _recurrent(args: tuple, kwargs: dict, out: list[Tensor]) -> int:
    given = tensors((args, kwargs))
    positions = given[0].numel() // given[0].shape[-1]
    return positions * sum(t.numel() for t in given if isinstance(t, nn.Parameter) and t.ndim == 2)


_MACS: dict[str, Callable[[tuple, dict, list[Tensor]], int]] = {
    **{f"conv{d}d": _conv for d in (1, 2, 3)},
    **{f"conv_transpose{d}d": _transposed for d in (1, 2, 3)},
    **dict.fromkeys(("convolution", "conv_tbc", "deform_conv2d"), _conv),
    **dict.fromkeys(("linear", "matmul", "__matmul__", "mm", "bmm", "mv", "dot", "inner", "chain_matmul"), _matmul),
    **dict.fromkeys(("__rmatmul__", "tensordot", "vdot", "multi_dot"), _matmul),
    **dict.fromkeys(("addmm", "addmm_", "baddbmm", "baddbmm_", "addbmm", "addmv"), _addmm),
    **dict.fromkeys(_ATTENTION, _attention),
    **dict.fromkeys(_RECURRENT, _recurrent),
    "einsum": _einsum,
    "bilinear": _bilinear,
    "scaled_dot_product_attention": _scaled_dot_product,
}
