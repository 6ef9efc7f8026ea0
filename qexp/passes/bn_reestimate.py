"""Batch norms that see the quantized network: their running statistics measured again."""

from __future__ import annotations

import logging

import torch
from torch import nn
from tqdm import tqdm

from qexp.errors import QexpError
from qexp.layers.swap import evaluating
from qexp.passes.base import Moment, Pass

log = logging.getLogger(__name__)


class ReestimateBN(Pass):
    """Replaces every batch norm's running mean and variance by those of the quantized network on the calibration images.

    Once the quantizers have their ranges (for a network that is then trained, a start), and again after a training with quantizers. The
    statistics are means over batches, each counted alike; the batches are as even as the images allow. What else behaves otherwise in
    training (dropout, quantizers with memory) stays as in evaluation.

    Args:
        batch: Images a batch, at most; at least 2.

    Source: Nagel et al. 2022 (arXiv 2203.11086), section 4.1; Sun et al. 2019 (arXiv 1904.02848) after post-training quantization.
    """

    def __init__(self, batch: int = 128) -> None:
        if batch < 2:
            raise QexpError(
                f"ReestimateBN(batch={batch}): a batch of at least 2 images is needed to measure a variance"
            )
        self.batch = batch

    def on_fitted(self, model: nn.Module, moment: Moment) -> None:
        self._measure(model, moment)

    def on_trained(self, model: nn.Module, moment: Moment) -> None:
        self._measure(model, moment)

    @torch.no_grad()
    def _measure(self, model: nn.Module, moment: Moment) -> None:
        """Measures; reports how many batch norms, and by how many of its old standard deviations a mean moved at most."""
        norms = [
            (name, m)
            for name, m in model.named_modules()
            if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.running_mean is not None
        ]
        if not norms:
            raise QexpError(
                "batch norm re-estimation found no batch norm with running statistics: run with bn=keep (or freeze); "
                "bias correction is its counterpart for folded ones (passes=bias_correction)"
            )
        images = torch.cat(list(moment.images))
        if len(images) < 2:
            raise QexpError("batch norm re-estimation needs at least 2 calibration images (n_calibrate)")
        before = [(m.running_mean.clone(), m.running_var.clone(), m.momentum) for _, m in norms]
        device = norms[0][1].running_mean.device
        batches = images.tensor_split(-(-len(images) // self.batch))
        with evaluating(model):
            for _, m in norms:
                m.reset_running_stats()
                m.momentum = None  # a plain mean over batches
                m.train()
            try:
                for x in tqdm(batches, desc="batch norms", unit="batch", leave=False, disable=not moment.progress):
                    model(x.to(device))
            finally:
                for (_, m), (_, _, momentum) in zip(norms, before):
                    m.momentum = momentum
        moved = {
            name: float(((m.running_mean - mean).abs() / (var + m.eps).sqrt()).max())
            for (name, m), (mean, var, _) in zip(norms, before)
        }
        largest = max(moved, key=moved.__getitem__)
        log.info(
            "%d batch norms measured again; the mean that moved most, by %.2f standard deviations, in %s",
            len(norms),
            moved[largest],
            largest,
        )
        moment.findings |= {"reestimated_norms": len(norms), "largest_norm_shift": round(moved[largest], 4)}
