"""Turns weights that a network computes in each call (weight norm, spectral norm, pruning masks) into ordinary parameters."""

from __future__ import annotations

import logging
from contextlib import nullcontext

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune, remove_spectral_norm, remove_weight_norm
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from qexp.errors import QexpError
from qexp.layers.quantized import WEIGHTED
from qexp.layers.swap import evaluating
from qexp.passes.unchanged import unchanged

log = logging.getLogger(__name__)
_HOOKS = (WeightNorm, SpectralNorm, prune.BasePruningMethod)


def computes_weights(model: nn.Module) -> bool:
    """Whether any module has a weight that is computed in one of the known ways."""
    return any(
        parametrize.is_parametrized(m) or any(isinstance(h, _HOOKS) for h in m._forward_pre_hooks.values())
        for m in model.modules()
    )


def make_permanent(model: nn.Module, images: Tensor) -> list[str]:
    """Replaces every computed weight by a parameter with its value, in place; returns the names of the layers.

    Float edits change weights, and quantizers are attached to them. A weight that is computed from other parameters loses the edit,
    and a layer with parametrizations has a special class.

    Args:
        model: Float network.
        images: `[N, C, H, W]`, on which it must compute the same before and after.

    Raises:
        QexpError: A convolution or linear layer computes its weight in a way that cannot be made permanent.
    """
    with unchanged(model, images, "making computed weights permanent") if computes_weights(model) else nullcontext():
        return _made_permanent(model)


@torch.no_grad()
def _made_permanent(model: nn.Module) -> list[str]:
    done: dict[str, str] = {}
    with evaluating(model):  # in training, spectral norm takes another step at each access
        for name, module in list(model.named_modules()):
            if parametrize.is_parametrized(module):
                done[name] = _parametrizations(module)
            for hook in list(module._forward_pre_hooks.values()):
                done |= {name: kind} if (kind := _removed(module, hook)) else {}
            for tensor in ("weight", "bias"):
                if type(module) in WEIGHTED and tensor not in module._parameters:
                    raise QexpError(
                        f"{name}: its {tensor} is no parameter of the layer but computed anew in each call; float edits and quantizers "
                        "need a parameter: make it permanent before the run (torch.nn.utils.parametrize offers the standard way)"
                    )
    if done:
        kinds = ", ".join(f"{name} ({kind})" for name, kind in list(done.items())[:4]) + (
            " ..." if len(done) > 4 else ""
        )
        log.info(
            "weights of %d layers that were computed from other parameters are parameters now: %s", len(done), kinds
        )
    if any("mask" in kind for kind in done.values()):
        log.info("pruned weights are zero now but no longer held at zero: a training may move them")
    return list(done)


def _parametrizations(module: nn.Module) -> str:
    """Removes a module's parametrizations; returns a description of them."""
    kinds = []
    for tensor, steps in list(module.parametrizations.items()):
        kinds += [type(step).__name__.strip("_") for step in steps]
        parametrize.remove_parametrizations(module, tensor, leave_parametrized=True)
        if tensor not in module._parameters:  # torch leaves an ordinary tensor in place of several originals
            value = getattr(module, tensor)
            delattr(module, tensor)
            module.register_parameter(tensor, nn.Parameter(value.detach().clone()))
    return ", ".join(kinds)


def _removed(module: nn.Module, hook: object) -> str:
    """Removes a hook that computes a weight; returns a description of it, empty for other hooks."""
    if isinstance(hook, WeightNorm):
        remove_weight_norm(module, hook.name)
        return "weight norm"
    if isinstance(hook, SpectralNorm):
        remove_spectral_norm(module, hook.name)
        return "spectral norm"
    if isinstance(hook, prune.BasePruningMethod):
        prune.remove(module, hook._tensor_name)
        return "pruning mask"
    return ""
