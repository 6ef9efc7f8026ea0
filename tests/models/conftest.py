"""A counter of what one image costs, independent of qexp.network.cost."""

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from torch import nn


class Counts(NamedTuple):
    params: int
    macs: int
    bn_elements: int


def _count(model: nn.Module, *shape: int) -> Counts:
    macs = bn = 0

    def seen(module, inputs, output):
        nonlocal macs, bn
        if isinstance(module, nn.Conv2d | nn.Linear):
            macs += output.numel() * module.weight[0].numel()
        else:
            bn += output.numel()

    kinds = nn.Conv2d | nn.Linear | nn.BatchNorm2d
    hooks = [m.register_forward_hook(seen) for m in model.modules() if isinstance(m, kinds)]
    device = next(model.parameters()).device
    with torch.no_grad():
        model.eval()(torch.zeros(1, *shape, device=device))
    for hook in hooks:
        hook.remove()
    return Counts(sum(p.numel() for p in model.parameters()), macs, bn)


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Small tensors gain nothing from threads, and lose much on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def count() -> Callable[..., Counts]:
    """Call with a model and an input shape [C, H, W]."""
    return _count
