"""Weights that several layers share."""

from __future__ import annotations

from torch import Tensor, nn


def sharers(model: nn.Module) -> dict[int, list[str]]:
    """Returns the names of the modules that hold each parameter: one entry per piece of memory."""
    found: dict[int, list[str]] = {}
    for name, module in model.named_modules():
        for parameter in module._parameters.values():
            if parameter is not None and parameter.numel():
                found.setdefault(_place(parameter), []).append(name)
    return found


def tied_with(model: nn.Module, name: str, tensors: tuple[str, ...] = ("weight", "bias")) -> list[str]:
    """Returns the other layers that hold the same weight or bias as this layer."""
    module, held = model.get_submodule(name), sharers(model)
    own = [module._parameters.get(tensor) for tensor in tensors]
    return sorted({other for p in own if p is not None for other in held.get(_place(p), []) if other != name})


def untie(model: nn.Module, name: str, tensor: str) -> list[str]:
    """Gives a layer its own copy of a shared weight or bias, in place; returns the layers that keep the shared one."""
    others = tied_with(model, name, (tensor,))
    if others:
        module = model.get_submodule(name)
        parameter = getattr(module, tensor)
        setattr(module, tensor, nn.Parameter(parameter.detach().clone(), requires_grad=parameter.requires_grad))
    return others


def _place(parameter: Tensor) -> int:
    return parameter.untyped_storage().data_ptr() if parameter.device.type != "meta" else id(parameter)
