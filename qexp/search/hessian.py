"""Curvature of the loss along each weight tensor, which predicts the cost of a rounding error without trying it."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from qexp.errors import QexpError
from qexp.layers.swap import evaluating
from qexp.search.quantizers_by_width import QuantizersByWidth


def traces(
    shelf: QuantizersByWidth, images: Tensor, probes: int = 4, batch: int = 64, seed: int = 0, progress: bool = True
) -> dict[str, float]:
    """Returns the mean Hessian eigenvalue (trace over number of weights) of each searched layer's weight.

    The trace is Hutchinson's estimate, the mean of `v' H v` over random signs v on that layer's weights. The loss is the cross-entropy
    against the float network's own output distribution: its Hessian at the float weights is the Fisher information, which needs no labels
    and is never negative.

    Args:
        shelf: Quantizers of the weights to examine; its network is float during the estimate.
        images: `[N, C, H, W]`, all used.
        probes: Random vectors per layer and batch.
        batch: Images per backward pass; the pass keeps its graph in memory.
        seed: Seed of the random signs.
        progress: Show a progress bar.

    Source: Dong et al. 2019 (arXiv 1911.03852), section 3.
    Differs from the paper: the loss uses the network's own distribution as labels.
    """
    layers = [layer for layer, site in shelf.keys if site == "weight"]
    shelf.nothing()
    weights = [shelf.model.get_submodule(name).weight for name in layers]
    asked = [w.requires_grad for w in weights]
    for w in weights:
        w.requires_grad_(True)
    generator = torch.Generator().manual_seed(seed)
    totals = [0.0] * len(layers)
    parts = images.split(batch)
    try:
        with evaluating(shelf.model), torch.enable_grad():
            for part in tqdm(parts, desc="curvature", unit="batch", leave=False, disable=not progress):
                y = shelf.model(part)
                if y.ndim != 2:
                    raise QexpError(
                        f"search.hessian needs a classifier with results [N, classes]; this network returns {list(y.shape)}"
                    )
                loss = -(F.softmax(y, 1).detach() * F.log_softmax(y, 1)).sum() / len(images)
                gradients = torch.autograd.grad(loss, weights, create_graph=True)
                for i, (w, gradient) in enumerate(zip(weights, gradients)):
                    # one layer at a time: probing all at once adds terms between layers, and their noise hides small traces
                    for probe in range(probes):
                        sign = torch.randint(0, 2, w.shape, generator=generator).to(w) * 2 - 1
                        last = i == len(weights) - 1 and probe == probes - 1
                        (product,) = torch.autograd.grad(gradient, w, sign, retain_graph=not last)
                        totals[i] += float((sign * product).sum()) / probes
    finally:
        for w, was in zip(weights, asked):
            w.requires_grad_(was)
        shelf.restore()
    return {name: max(total, 0.0) / w.numel() for name, total, w in zip(layers, totals, weights)}


@torch.no_grad()
def weigh(shelf: QuantizersByWidth, trace: dict[str, float], widths: Sequence[int]) -> pd.DataFrame:
    """Returns the predicted rise of the loss, half the mean eigenvalue times the squared rounding error, by (layer, site, bits)."""
    rows = []
    for layer, site in shelf.keys:
        if site != "weight":
            continue
        w = shelf.model.get_submodule(layer).weight
        for bits in widths:
            error = float((shelf.quantizer((layer, site), bits)(w) - w).double().square().sum())
            rows.append({"layer": layer, "site": site, "bits": bits, "divergence": 0.5 * trace[layer] * error})
    return pd.DataFrame(rows)
