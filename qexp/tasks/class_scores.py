"""Finds the class scores in a network's outputs: a tensor, or the one tensor of class scores in a dictionary or tuple."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from qexp.errors import QexpError

log = logging.getLogger(__name__)
NAMES = ("logits", "out")  # names of the main scores where there are others beside them


class ClassScores:
    """A forward hook that makes a network return its class scores `[N, K]` alone; a class, so that it can be copied and saved.

    Args:
        num_classes: K.
        in_training: Place of the scores in the tuple (or key in the dictionary) that the network returns while training; None finds them.
    """

    def __init__(self, num_classes: int, in_training: int | str | None = None) -> None:
        self.num_classes, self.in_training = num_classes, in_training

    def __call__(self, network: nn.Module, _: Any, result: Any) -> Tensor:
        if network.training and self.in_training is not None and not isinstance(result, Tensor):
            return _scores(result[self.in_training], self.num_classes)
        return class_scores(result, self.num_classes)


def class_scores(result: Any, num_classes: int) -> Tensor:
    """Returns the class scores `[N, num_classes]` in a network's result.

    Of several tensors, it is the one named `logits` or `out`, or else the only one with the shape of scores.

    Raises:
        QexpError: The result holds no class scores, or several tensors of them.
    """
    if isinstance(result, Tensor):
        return _scores(result, num_classes)
    parts = _parts(result)
    named = [parts[name] for name in NAMES if isinstance(parts.get(name), Tensor)]
    if named:
        return _scores(named[0], num_classes)
    found = [x for x in parts.values() if isinstance(x, Tensor) and _is_scores(x, num_classes)]
    if len(found) == 1:
        return _scores(found[0], num_classes)
    kind = "a dictionary" if isinstance(result, Mapping) else f"a {type(result).__name__}"
    raise QexpError(
        f"the network returns {kind} with {len(found)} tensors of class scores [N, {num_classes}] ({_shapes(parts)}); return the scores "
        "alone, or call them 'logits' or 'out' in a dictionary or named tuple"
    )


def take_class_scores(model: nn.Module, example: Tensor, num_classes: int) -> None:
    """Makes a network return class scores alone, in place; a network that already does so stays unchanged.

    Args:
        model: The float network.
        example: One image `[1, C, H, W]`.
        num_classes: K.

    Raises:
        QexpError: The network's result has no recognisable class scores for the data set's classes.
    """
    images = torch.cat([example, example])  # two: a network may squeeze away a batch dimension of 1
    with torch.no_grad(), _as_it_was(model):
        model.eval()
        result = model(images)
        scores = class_scores(result, num_classes)
        alone = model(example)
        # only the outer module: its layers compute as in evaluation, so that results can be compared
        model.training = True
        try:
            taught = model(images)
        except Exception:  # an auxiliary head that these images are too small for; if it is needed, training raises
            taught = result
    plain = [isinstance(r, Tensor) and r.ndim == 2 for r in (result, taught, alone)]
    if all(plain):
        return
    place = None
    if not isinstance(taught, Tensor):
        parts = _parts(taught)
        same = [k for k, x in parts.items() if isinstance(x, Tensor) and _is_scores(x, num_classes)]
        same = [k for k in same if torch.allclose(_scores(parts[k], num_classes), scores, rtol=1e-3, atol=1e-5)]
        place = same[0] if same else None
        if place is None:
            class_scores(taught, num_classes)
        elif not isinstance(taught, Mapping):
            place = list(parts).index(place)
        others = len(parts) - 1
        if others:
            log.info(
                "the network returns class scores and %d other results, which are neither trained nor scored", others
            )
    model.register_forward_hook(ClassScores(num_classes, place))


def _scores(x: Tensor, num_classes: int) -> Tensor:
    """Returns scores as `[N, K]`, also from maps of one pixel and from a single image whose dimension was squeezed away."""
    if isinstance(x, Tensor) and x.shape == (num_classes,) and x.is_floating_point():
        return x[None]
    if not isinstance(x, Tensor) or not _is_scores(x, num_classes):
        got = list(x.shape) if isinstance(x, Tensor) else type(x).__name__
        raise QexpError(
            f"the network returns {got} for 2 images, and the data set has {num_classes} classes: it must return one score for each, "
            f"[2, {num_classes}]; give the network num_classes={num_classes}, or choose another data set"
            if not isinstance(x, Tensor) or x.ndim < 1 or len(x) == 2
            else f"the network returns {got}, and the data set has {num_classes} classes: one score for each is needed"
        )
    return x.flatten(1)


def _is_scores(x: Tensor, num_classes: int) -> bool:
    return x.ndim >= 2 and x.shape[1] == num_classes and all(n == 1 for n in x.shape[2:]) and x.is_floating_point()


def _parts(result: Any) -> dict[Any, Any]:
    """Returns the parts of a dictionary or (named) tuple by their keys or positions."""
    if isinstance(result, Mapping):
        return dict(result)
    if isinstance(result, tuple | list):
        return dict(zip(getattr(result, "_fields", range(len(result))), result))
    raise QexpError(f"the network returns {type(result).__name__}; class scores, a tensor [N, classes], are needed")


def _shapes(parts: dict[Any, Any]) -> str:
    return ", ".join(f"{k}: {list(x.shape) if isinstance(x, Tensor) else type(x).__name__}" for k, x in parts.items())


@contextmanager
def _as_it_was(model: nn.Module) -> Iterator[None]:
    """Restores, after the block, the network's modes and buffers and the state of the random numbers."""
    modes = [(m, m.training) for m in model.modules()]
    buffers = [(b, b.clone()) for b in model.buffers()]
    with torch.random.fork_rng(devices=[]):
        try:
            yield
        finally:
            for module, training in modes:
                module.training = training
            for buffer, before in buffers:
                buffer.copy_(before)
