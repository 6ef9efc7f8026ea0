"""Curvature of the loss in a quantizer's outputs, from which the delta of EWGS is set while a network trains."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from pytorch_lightning import Callback, LightningModule, Trainer
from torch import Tensor, nn

from qexp.errors import QexpError
from qexp.layers.quantized import attribute, quantizers
from qexp.layers.swap import evaluating
from qexp.quantizers.ewgs import EWGSInput, EWGSWeight
from qexp.system.within import hooked

log = logging.getLogger(__name__)


class Curvature(Callback):
    """Sets the delta of every EWGS quantizer with `delta: hessian` to `max(0, (Tr(H)/N) / (3 std(g)))`.

    H is the Hessian and g the gradient of the loss with respect to the N values that the quantizer returns. The trace is estimated with
    random signs v, `E[v H v]`, for all tensors at once, on the first batches of an epoch, with batch norms in evaluation mode. Quantizers
    of other methods are off during the measurement, since their kernels have no second derivative. Before it delta is 0.

    Args:
        every: Epochs between two measurements, and before the first one.
        batches: Number of training batches per measurement.
        vectors: Greatest number of random vectors per batch.
        tolerance: Relative change of the mean trace below which a batch needs no more vectors.
        seed: Seed of the random vectors.

    Source: Lee, Kim, Ham 2021 (arXiv 2104.00903), equations 8 and 9; the estimate: Yao et al. 2020 (arXiv 1912.07145), algorithm 1.
    """

    def __init__(
        self, every: int = 10, batches: int = 3, vectors: int = 50, tolerance: float = 1e-3, seed: int = 0
    ) -> None:
        if min(every, batches, vectors) < 1:
            raise QexpError(
                f"Curvature: every={every}, batches={batches}, vectors={vectors} are not allowed; use whole numbers from 1 on"
            )
        self.every, self.batches, self.vectors, self.tolerance, self.seed = every, batches, vectors, tolerance, seed
        self._seen: list[dict[str, float]] = []

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        epoch = trainer.current_epoch
        if not epoch or epoch % self.every or batch_idx >= self.batches:
            return
        loss = getattr(pl_module, "loss", None)
        if not callable(loss):
            raise QexpError(
                f"Curvature: {type(pl_module).__name__} has no loss of outputs and targets; set delta to a number"
            )
        images, targets = batch
        self._seen = [] if batch_idx == 0 else self._seen
        self._seen.append(self.measure(pl_module.model, lambda y: loss(y, targets), images))
        if batch_idx == min(self.batches, int(trainer.num_training_batches)) - 1:
            self.put(pl_module.model)

    def put(self, model: nn.Module) -> None:
        """Sets the delta of each quantizer to the mean over the batches."""
        for name, quantizer in _curved(model).items():
            quantizer.set_delta(sum(seen[name] for seen in self._seen) / len(self._seen))
        deltas = [float(q.delta) for q in _curved(model).values()]
        if deltas:
            log.info(
                "EWGS: delta of %d tensors set from the Hessian, %.3g to %.3g", len(deltas), min(deltas), max(deltas)
            )

    def measure(self, model: nn.Module, loss: Callable[[Tensor], Tensor], images: Tensor) -> dict[str, float]:
        """Returns delta of each EWGS quantizer, by layer and site, on one batch of images."""
        curved = _curved(model)
        if not curved:
            return {}
        device = images.device
        generator = torch.Generator(device).manual_seed(self.seed)
        with evaluating(model), torch.enable_grad(), others_off(model), torch.autocast(device.type, enabled=False):
            with _outputs(curved) as outputs:
                value = loss(model(images))
            names, tensors = list(outputs), list(outputs.values())
            grads = torch.autograd.grad(value, tensors, create_graph=True)
            total = torch.zeros(len(tensors), device=device)
            before = None
            for number in range(1, self.vectors + 1):
                signs = [
                    torch.randint(0, 2, g.shape, generator=generator, device=device, dtype=g.dtype).mul_(2).sub_(1)
                    for g in grads
                ]
                along = sum((g * v).sum() for g, v in zip(grads, signs))
                products = torch.autograd.grad(along, tensors, retain_graph=True, allow_unused=True)
                total += torch.stack(
                    [(h * v).sum() if h is not None else total.new_zeros(()) for h, v in zip(products, signs)]
                )
                mean = float(total.sum() / number)
                if before is not None and abs(mean - before) < self.tolerance * (abs(before) + 1e-12):
                    break
                before = mean
        traces = (total / number).tolist()
        return {
            name: max(0.0, trace / g.numel() / max(3 * float(g.detach().std(correction=min(1, g.numel() - 1))), 1e-30))
            for name, trace, g in zip(names, traces, grads)
        }


def _curved(model: nn.Module) -> dict[str, EWGSWeight | EWGSInput]:
    """Returns the quantizers whose delta comes from the Hessian, by layer and site."""
    found = {f"{name} ({site})": q for name, site, q in quantizers(model)}
    return {key: q for key, q in found.items() if isinstance(q, EWGSWeight | EWGSInput) and q.from_hessian}


@contextmanager
def others_off(model: nn.Module) -> Iterator[None]:
    """Turns off, inside the block, the quantizers of other methods than EWGS."""
    held = [
        (model.get_submodule(n), s, q) for n, s, q in quantizers(model) if not isinstance(q, EWGSWeight | EWGSInput)
    ]
    for layer, site, _ in held:
        setattr(layer, attribute(site), nn.Identity())
    try:
        yield
    finally:
        for layer, site, quantizer in held:
            setattr(layer, attribute(site), quantizer)


@contextmanager
def _outputs(curved: dict[str, nn.Module]) -> Iterator[dict[str, Tensor]]:
    """Yields a dictionary that receives, inside the block, the result of each quantizer's last call."""
    seen: dict[str, Tensor] = {}

    def keep(name: str):
        def hook(_: nn.Module, __: Any, y: Tensor) -> None:
            seen[name] = y

        return hook

    with hooked(q.register_forward_hook(keep(name)) for name, q in curved.items()):
        yield seen
