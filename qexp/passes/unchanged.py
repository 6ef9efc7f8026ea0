"""Checks that an edit of a float network does not change its results."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from qexp.errors import QexpError
from qexp.layers.swap import evaluating
from qexp.passes.base import Pass, PassContext

TOLERANCE = 1e-3  # of the results' norm: float32 leaves a thousandth of it where nothing went wrong
IMAGES = 4


@contextmanager
def unchanged(model: nn.Module, images: Tensor, edit: str) -> Iterator[None]:
    """Context manager: raises at the end if the edits inside changed the network's results on some images.

    Args:
        model: Float network.
        images: `[N, C, H, W]`; a few of them are looked at.
        edit: What the error calls the edit.
    """
    before = results(model, images)
    yield
    check_results(model, images, before, edit)


def edit_floats(edit: Pass, model: nn.Module, context: PassContext) -> None:
    """Runs a pass on the float weights, in place.

    Raises:
        QexpError: The network does not compute the same afterwards, though the pass does not declare that it changes results.
    """
    if type(edit).on_float is Pass.on_float:
        return
    before = results(model, context.images[0])
    edit.on_float(model, context)
    if edit.keeps_results:  # known afterwards: it may depend on what the network holds
        check_results(model, context.images[0], before, type(edit).__name__)


def check_results(model: nn.Module, images: Tensor, before: list[Tensor], edit: str) -> None:
    """Raises, naming the edit, if the network's results on the images differ from `before`."""
    change = relative_change(before, results(model, images))
    if change > TOLERANCE:
        raise QexpError(
            f"{edit} changed what the float network computes, by {change:.3g} of its results (allowed: {TOLERANCE:g}); the network does "
            f"something that this edit does not handle: {'use bn=keep' if edit == 'bn=fold' else 'run without it'}"
        )


@torch.no_grad()
def results(model: nn.Module, images: Tensor) -> list[Tensor]:
    """Returns all tensors of a network's results on a few of the images, in evaluation mode, with the same random numbers each time."""
    home = next((t.device for t in model.parameters()), torch.device("cpu"))
    with evaluating(model), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return [t.detach().clone() for t in _tensors(model(images[:IMAGES].to(home)))]


def relative_change(before: list[Tensor], after: list[Tensor]) -> float:
    """Returns the largest `|after - before| / |before|` of the tensors; 0 where the results were not finite to begin with."""
    if len(before) != len(after) or any(a.shape != b.shape for a, b in zip(before, after)):
        return float("inf")
    changes = [0.0]
    for a, b in zip(before, after):
        a, b = a.double(), b.double()
        if bool(a.isfinite().all()):
            change = float((b - a).norm() / a.norm().clamp_min(1e-30))
            changes.append(change if change == change else float("inf"))
    return max(changes)


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        if value.is_floating_point():
            yield value
    elif isinstance(value, Mapping):
        yield from _tensors(list(value.values()))
    elif isinstance(value, tuple | list):
        for part in value:
            yield from _tensors(part)
