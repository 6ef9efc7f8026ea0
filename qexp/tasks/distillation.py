"""Distillation: a network learns from a teacher's outputs on the same images, besides the labels."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qexp.errors import QexpError, near
from qexp.system.within import evaluating, hooked


class Distillation:
    """`labels * loss + logits * T^2 KL(teacher || student) + features * distance`, the teacher fixed and in evaluation mode.

    Both networks' probabilities are softened by the temperature T. The distance of features is the mean over the layers of
    `|s - t|^2 / |t|^2`, so that no layer counts more for its larger values.

    The teacher is not part of the training module: it is not trained, not saved in checkpoints and not copied with the module.

    Args:
        teacher: A network with the student's classes; it receives the student's images.
        logits: Weight of the teacher's class probabilities.
        temperature: T.
        features: Weight of the distance between outputs of `layers`.
        layers: Names of modules that both networks have and whose outputs are compared.
        labels: Weight of the loss against the labels.

    Source: Hinton, Vinyals, Dean 2015 (arXiv 1503.02531), section 2; features after Romero et al. 2015 (arXiv 1412.6550), equation 3.
    Differs from the paper: features are compared as they are, without a regressor between, relative to the teacher's size, and in the
    same training instead of one before it.
    """

    def __init__(
        self,
        teacher: nn.Module,
        logits: float = 1.0,
        temperature: float = 4.0,
        features: float = 0.0,
        layers: Sequence[str] = (),
        labels: float = 1.0,
    ) -> None:
        for name, value in (("logits", logits), ("features", features), ("labels", labels)):
            if value < 0:
                raise QexpError(f"distill.{name}={value} is not allowed; use a weight of 0 or more")
        if temperature <= 0:
            raise QexpError(f"distill.temperature={temperature} is not allowed; use a number above 0, usually 1..10")
        if features and not layers:
            raise QexpError(
                "distill.features: no layers to compare; name modules with schedule.distill.layers=[layer1, ...]"
            )
        self.teacher = teacher.eval().requires_grad_(False)
        self.logits, self.temperature, self.labels = logits, temperature, labels
        self.features, self.layers = features, tuple(layers) if features else ()

    def __deepcopy__(self, memo: dict) -> Distillation:
        return self  # copies of a training module (averaged weights) share the one teacher, which never changes

    def check(self, student: nn.Module, example: Tensor, num_classes: int) -> None:
        """Raises if the teacher has other classes than the student, lacks a layer to compare, or has another shape there."""
        for name in self.layers:
            for who, network in (("the network", student), ("the teacher", self.teacher)):
                known = [n for n, _ in network.named_modules() if n]
                if name not in known:
                    raise QexpError(f"distill.layers: {who} has no module {name!r}{near(name, known)}")
        with torch.no_grad(), self._watching(self.teacher) as theirs:
            classes = self.teacher(example).shape[-1]
        if classes != num_classes:
            raise QexpError(
                f"distill: the teacher ({type(self.teacher).__name__}) has {classes} classes, the data set has {num_classes}; "
                "choose a teacher trained on the same classes"
            )
        with torch.no_grad(), evaluating(student), self._watching(student) as ours:
            student(example)
        for name in self.layers:
            if ours[name].shape != theirs[name].shape:
                raise QexpError(
                    f"distill.layers: {name} returns {list(ours[name].shape)} in the network, {list(theirs[name].shape)} in the teacher; "
                    "name layers with equal shapes in schedule.distill.layers"
                )

    def step(self, student: nn.Module, images: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the student's logits `[N, classes]` and the teacher's part of the loss."""
        with self._watching(student) as ours:
            logits = student(images)
        with torch.no_grad(), self._watching(self.teacher) as theirs:
            target = self.teacher(images)
        loss = self.logits * soft_divergence(logits, target, self.temperature) if self.logits else logits.new_zeros(())
        if self.layers:
            loss = loss + self.features * feature_distance([(ours[n], theirs[n]) for n in self.layers])
        return logits, loss

    @contextmanager
    def _watching(self, network: nn.Module) -> Iterator[dict[str, Tensor]]:
        """Yields a dictionary that receives, inside the block, the outputs of the layers to compare, by name."""
        seen: dict[str, Tensor] = {}

        def keep(name: str):
            def hook(_: nn.Module, __: Any, output: Tensor) -> None:
                seen[name] = output

            return hook

        with hooked(network.get_submodule(name).register_forward_hook(keep(name)) for name in self.layers):
            yield seen


def soft_divergence(logits: Tensor, target: Tensor, temperature: float) -> Tensor:
    """Returns `T^2 KL(softmax(target / T) || softmax(logits / T))`, the mean over samples."""
    ours, theirs = (F.log_softmax(x.float() / temperature, dim=-1) for x in (logits, target))
    return temperature**2 * F.kl_div(ours, theirs, reduction="batchmean", log_target=True)


def feature_distance(pairs: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """Returns the mean over pairs (ours, theirs) of the squared distance relative to the square of theirs."""
    terms = [(a.float() - b.float()).square().sum() / b.float().square().sum().clamp_min(1e-12) for a, b in pairs]
    return torch.stack(terms).mean()
