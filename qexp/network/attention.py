"""Lets torch's attention modules be computed from their parts, in place, where these compute the same."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from qexp.layers.swap import evaluating
from qexp.models.attention import OPTIONS, MultiheadAttention, has_parts, in_parts, whole
from qexp.network.graph import near
from qexp.system.within import hooked


@torch.no_grad()
def take_apart(model: nn.Module, images: Any) -> None:
    """Gives each attention module of torch that attends to one tensor its parts, which can carry quantizers."""
    for layer in model.modules():
        if isinstance(layer, nn.TransformerEncoderLayer):
            # In evaluation without gradients torch computes such a layer from its weights in one function, where no layer is seen.
            layer.activation_relu_or_gelu = 0
    mine = {n: m for n, m in model.named_modules() if type(m) is nn.MultiheadAttention}
    if not mine:
        return
    given: dict[str, tuple[tuple, dict]] = {}
    unlike: set[str] = set()

    def keep(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple, kwargs: dict) -> None:
            named = dict(zip(("query", "key", "value", *OPTIONS), args)) | kwargs
            x, *others = (named.pop(side) for side in ("query", "key", "value"))
            if not has_parts(module, x, *others, named):
                unlike.add(name)
            given.setdefault(name, (x.clone(), named))

        return hook

    with evaluating(model), torch.random.fork_rng(devices=[]):
        with hooked(m.register_forward_pre_hook(keep(n), with_kwargs=True) for n, m in mine.items()):
            model(images)
        for name, (x, options) in given.items():
            if name in unlike:
                continue
            before = mine[name](x, x, x, **options)
            in_parts(mine[name])
            if not near(before, mine[name](x, x, x, **options)):
                whole(mine[name])
    for layer in mine.values():
        if type(layer) is MultiheadAttention:
            layer.in_proj.train(layer.training)
            layer.attention.train(layer.training)
