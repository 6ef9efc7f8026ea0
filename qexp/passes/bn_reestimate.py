"""Measures the running statistics of batch norms again, in the quantized network."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from tqdm import tqdm

from qexp.errors import QexpError
from qexp.layers.swap import evaluating, quantizers_off
from qexp.passes.base import Pass, PassContext

log = logging.getLogger(__name__)


class BnReestimate(Pass):
    """Moves every batch norm's running mean and variance by the shift that quantization causes on the calibration images.

    It runs once the quantizers have their ranges and before any training: `mean + (mean_q - mean_f)`, `var * var_q / var_f`, where q
    and f are the quantized and the float network on the same images. Each batch norm gets its input from batch norms measured before.
    The statistics are means over batches of equal weight; batch sizes are as even as possible. Other modules that differ in training
    (dropout, quantizers with memory) stay in evaluation mode.

    Args:
        batch: Largest number of images per batch (one more if a single image would be left over); at least 2.
        relative: False uses `mean_q` and `var_q` themselves. This makes networks trained on augmented images worse, since calibration
            images are not augmented: padded crops alone move the first mean of the public ResNet-20 by a quarter of its standard
            deviation.
        after_training: Also measure `mean_q` and `var_q` after training with quantizers; the same warning applies.

    Source: Sun et al. 2019 (arXiv 1904.02848), after post-training quantization; Nagel et al. 2022 (arXiv 2203.11086), section 4.1.
    Differs from the papers: `relative`.
    """

    def __init__(self, batch: int = 128, relative: bool = True, after_training: bool = False) -> None:
        if batch < 2:
            raise QexpError(
                f"BnReestimate(batch={batch}) is not allowed; use 2 or more, since a variance needs 2 images"
            )
        self.batch, self.relative, self.after_training = batch, relative, after_training

    def on_fitted(self, model: nn.Module, context: PassContext) -> None:
        self._settle(model, context, self.relative)

    def on_trained(self, model: nn.Module, context: PassContext) -> None:
        if self.after_training:
            self._settle(model, context, relative=False)

    @torch.no_grad()
    def _settle(self, model: nn.Module, context: PassContext, relative: bool) -> None:
        """Replaces the statistics; reports the number of batch norms and the largest shift of a mean, in old standard deviations."""
        norms = {
            name: m
            for name, m in model.named_modules()
            if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.running_mean is not None
        }
        if not norms:
            raise QexpError(
                "batch norm re-estimation found no batch norm with running statistics: run with bn=keep (or freeze); "
                "bias correction is its counterpart for folded ones (passes=bias_correction)"
            )
        images = torch.cat(list(context.images))
        if len(images) < 2:
            raise QexpError("batch norm re-estimation needs at least 2 calibration images (n_calibrate)")
        batches = images.tensor_split(min(-(-len(images) // self.batch), len(images) // 2))  # none of a single image
        old = {name: (m.running_mean.clone(), m.running_var.clone()) for name, m in norms.items()}
        if relative:
            with quantizers_off(model):
                own = measured(model, norms, batches, context.progress)
        found = measured(model, norms, batches, context.progress)
        moved = {}
        for name, m in norms.items():
            (mean, var), (new_mean, new_var) = old[name], found[name]
            if relative:
                new_mean = mean + new_mean - own[name][0]
                new_var = var * new_var / own[name][1].clamp_min(1e-12)
            m.running_mean.copy_(new_mean)
            m.running_var.copy_(new_var)
            moved[name] = float(((new_mean - mean).abs() / (var + m.eps).sqrt()).max())
        largest = max(moved, key=moved.__getitem__)
        log.info(
            "%d batch norms measured again; %s moved most, by %.2f standard deviations",
            len(norms),
            largest,
            moved[largest],
        )
        context.findings |= {"reestimated_norms": len(norms), "largest_norm_shift": round(moved[largest], 4)}


def measured(
    model: nn.Module, norms: Mapping[str, nn.Module], batches: Sequence[Tensor], progress: bool
) -> dict[str, tuple[Tensor, Tensor]]:
    """Returns mean and variance of each batch norm's input, `[C]` each. Every one normalises by the batch; its statistics change."""
    momentum = {name: m.momentum for name, m in norms.items()}
    with evaluating(model):
        for m in norms.values():
            m.reset_running_stats()
            m.momentum = None  # a plain mean over batches
            m.train()
        device = next(iter(norms.values())).running_mean.device
        try:
            for x in tqdm(batches, desc="batch norms", unit="batch", leave=False, disable=not progress):
                model(x.to(device))
        finally:
            for name, m in norms.items():
                m.momentum = momentum[name]
    return {name: (m.running_mean.clone(), m.running_var.clone()) for name, m in norms.items()}
