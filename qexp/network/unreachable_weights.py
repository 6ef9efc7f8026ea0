"""Weights that no quantizer could reach: multiplied outside the layer that holds them, or held by a layer of an unknown type."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from qexp.layers.quantized import QUANTIZED, float_class

_PRODUCTS = frozenset(
    {
        *(f"conv{t}{d}d" for t in ("", "_transpose") for d in (1, 2, 3)),
        *("linear", "bilinear", "matmul", "__matmul__", "__rmatmul__", "mm", "bmm", "addmm", "baddbmm", "einsum"),
        *("multi_head_attention_forward", "_native_multi_head_attention", "_transformer_encoder_layer_fwd"),
        *("lstm", "gru", "rnn_tanh", "rnn_relu", "lstm_cell", "gru_cell", "rnn_tanh_cell", "rnn_relu_cell"),
    }
)


@torch.no_grad()
def stray_weights(model: nn.Module, example: Tensor) -> tuple[str, ...]:
    """Returns, by layer name and type, who computes with weights that cannot carry quantizers, from one run of the model.

    Attention modules read the weights of a linear layer that they never call; a subclass of a convolution computes what the
    quantized convolution does not know. What merely adds a parameter (position embeddings) is no product and not meant.
    """
    owners: dict[int, list[tuple[str, nn.Module]]] = {}
    for name, module in model.named_modules():
        for parameter in module._parameters.values():
            if parameter is not None and parameter.ndim > 1:
                owners.setdefault(id(parameter), []).append((name, module))
    running: list[int] = []
    found: dict[str, None] = {}

    def enter(module: nn.Module, _: Any) -> None:
        running.append(id(module))

    def leave(module: nn.Module, *_: Any) -> None:
        running.remove(id(module))

    def used(weight: Tensor) -> None:
        holders = owners[id(weight)]
        if any(id(module) in running and float_class(module) in QUANTIZED for _, module in holders):
            return
        name, module = holders[0]
        bypassed = ": its weight is read behind the layer's back" if float_class(module) in QUANTIZED else ""
        found[f"{name} ({float_class(module).__name__}){bypassed}"] = None

    training_before = {m: m.training for m in model.modules()}
    modules = {id(m): m for holders in owners.values() for _, m in holders}.values()
    handles = [m.register_forward_pre_hook(enter) for m in modules] + [m.register_forward_hook(leave) for m in modules]
    model.eval()
    try:
        with _Watch(owners, used):
            model(example)
    finally:
        for module, training in training_before.items():
            module.training = training
        for handle in handles:
            handle.remove()
    return tuple(found)


class _Watch(TorchFunctionMode):
    """Reports every parameter that goes into a product."""

    def __init__(self, owners: dict[int, Any], used: Callable[[Tensor], None]) -> None:
        super().__init__()
        self.owners, self.used = owners, used

    def __torch_function__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if getattr(func, "__name__", "") in _PRODUCTS:
            for tensor in _tensors((args, tuple((kwargs or {}).values()))):
                if id(tensor) in self.owners:
                    self.used(tensor)
        return func(*args, **(kwargs or {}))


def _tensors(values: Any) -> Iterator[Tensor]:
    if isinstance(values, Tensor):
        yield values
    elif isinstance(values, tuple | list):
        for value in values:
            yield from _tensors(value)
