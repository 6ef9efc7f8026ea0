"""Measures how well one scale fits all channels of a tensor."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from qexp.calibration.site_stats import Calibration
from qexp.layers.quantized import channel_axis, weight_of
from qexp.quantizers.base import Quantizer


@torch.no_grad()
def channel_measures(
    model: nn.Module, layer: str, site: str, quantizer: Quantizer, seen: Calibration
) -> dict[str, float]:
    """Returns `channel_spread` (greatest channel magnitude over the median one) and `sqnr_channel` (SQNR of the median channel, dB).

    Where one channel is much larger than the rest, it dominates the error of the whole tensor. `sqnr_channel` of a weight is measured.
    That of an activation is computed from each channel's power in calibration and an error of `scale^2 / 12`, at most the power itself.
    The result is empty where the tensor has fewer than two channels.
    """
    owner = model.get_submodule(layer)
    weight = weight_of(owner, site)
    if weight is not None:
        if weight.ndim < 2:
            return {}
        rows, values = (w.transpose(0, channel_axis(owner, site)).flatten(1) for w in (weight, quantizer(weight)))
        reach, power, error = rows.abs().amax(1), rows.square().mean(1), (rows - values).square().mean(1)
    elif (layer, site) in seen:
        stats = seen[layer, site].channel
        if stats.empty:  # the calls of this layer have different numbers of channels
            return {}
        reach, power = torch.maximum(stats.min.abs(), stats.max.abs()), stats.mean.square() + stats.std.square()
        step = torch.as_tensor(quantizer.scale).detach().double().median().cpu()
        error = torch.minimum(step.square() / 12, power)
    else:
        return {}
    return _summary(reach.double().cpu(), power.double().cpu(), error.double().cpu())


def _summary(reach: Tensor, power: Tensor, error: Tensor) -> dict[str, float]:
    alive = (reach > 0) & (power > 0)
    if int(alive.sum()) < 2:
        return {}
    ratio = power[alive] / error[alive].clamp_min(1e-30)
    return {
        "channel_spread": float(reach[alive].max() / reach[alive].median()),
        "sqnr_channel": float(10 * torch.log10(ratio.median())),
    }
