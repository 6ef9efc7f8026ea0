"""Context managers for networks: hooks and evaluation mode inside a `with` block only."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from torch import nn
from torch.utils.hooks import RemovableHandle


@contextmanager
def hooked(hooks: Iterable[RemovableHandle]) -> Iterator[None]:
    """Context manager: removes hooks at the end, also if registering one of them failed.

    Args:
        hooks: Results of `register_forward_hook` and similar functions; a generator registers each hook here.

    Example:
        >>> import torch
        >>> layer, seen = nn.Linear(2, 1), []
        >>> with hooked(m.register_forward_hook(lambda *_: seen.append(1)) for m in [layer]):
        ...     _ = layer(torch.ones(1, 2))
        >>> _ = layer(torch.ones(1, 2))
        >>> seen
        [1]
    """
    handles = []
    try:
        for handle in hooks:
            handles.append(handle)
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Context manager: the model is in evaluation mode; afterwards each module is in its earlier mode, frozen ones too."""
    before = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in before:
            module.training = training
