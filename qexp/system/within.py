"""What holds for a network inside a `with` block alone: hooks, evaluation mode."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from torch import nn
from torch.utils.hooks import RemovableHandle


@contextmanager
def hooked(hooks: Iterable[RemovableHandle]) -> Iterator[None]:
    """Inside, hooks are on; afterwards they are off, also where one could not be put on.

    Args:
        hooks: What `register_forward_hook` and its like return; of a generator each is put on here.

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
    """Inside, the model is in evaluation mode; afterwards each module is in the mode it was in, frozen ones too."""
    before = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in before:
            module.training = training
