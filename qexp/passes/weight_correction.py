"""Weight correction: restores the mean (and spread) of each weight channel after quantization."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn

from qexp.errors import QexpError
from qexp.layers.quantized import channel_axis, quantizers, weight_of
from qexp.layers.weight_channels import arranged
from qexp.passes.base import Pass, PassContext

Correction = tuple[Tensor, Tensor]


def mean(w: Tensor, q: Tensor) -> Correction:
    """Returns gain 1 and the offset that restores the mean of each row of `w` `[O, n]`."""
    return torch.ones_like(w[:, 0]), w.mean(1) - q.mean(1)


def var_mean(w: Tensor, q: Tensor) -> Correction:
    """Returns the gain that restores the standard deviation of each row, and the offset that restores its mean."""
    spread = q.std(1, unbiased=True) if w.shape[1] > 1 else torch.zeros_like(q[:, 0])
    own = w.std(1, unbiased=True) if w.shape[1] > 1 else spread
    gain = torch.where(spread > 0, own / (spread + 1e-8), torch.ones_like(own))
    return gain, w.mean(1) - gain * q.mean(1)


def var(w: Tensor, q: Tensor) -> Correction:
    """Returns the gain that restores the standard deviation of each row, and the offset that leaves its quantized mean as it is."""
    gain, _ = var_mean(w, q)
    return gain, (1 - gain) * q.mean(1)


def paper(w: Tensor, q: Tensor) -> Correction:
    """Returns `xi` and `xi mu` of `xi (q + mu)`: the spread is restored, the mean becomes `xi` times the original."""
    shift = w.mean(1) - q.mean(1)
    norm = (q - q.mean(1, keepdim=True)).norm(dim=1)
    own = (w - w.mean(1, keepdim=True)).norm(dim=1)
    xi = torch.where(norm > 0, own / torch.where(norm > 0, norm, 1.0), torch.ones_like(own))
    return xi, xi * shift


FORMS: dict[str, Callable[[Tensor, Tensor], Correction]] = {
    "mean": mean,
    "var": var,
    "var_mean": var_mean,
    "paper": paper,
}


class WeightCorrection(Pass):
    """Restores the mean of each output channel of the quantized weights, once, after calibration.

    The codes stay; the quantizer carries a gain and an offset for each channel, `w^ = gain * x^ + offset`, which the epilogue of an
    integer layer applies (the offset times the sum of its inputs). Afterwards w^ is off the integer grid.

    Args:
        form: `mean` restores the mean; `var` the standard deviation (unbiased, as the source); `var_mean` both; `paper` the spread, and
            scales the restored mean with it, as equations 12-13 are written.

    Source: Banner et al. 2019 (arXiv 1810.05723), section 5; `mean`, `var` and `var_mean` as in their code.
    Differs from the source: a channel whose quantized values are all equal keeps gain 1.
    """

    def __init__(self, form: Literal["mean", "var", "var_mean", "paper"] = "mean") -> None:
        if form not in FORMS:
            raise QexpError(f"WeightCorrection(form={form!r}): allowed are {', '.join(FORMS)}")
        self.form = form

    @torch.no_grad()
    def on_fitted(self, model: nn.Module, context: PassContext) -> None:
        """Corrects every quantized weight; reports their number and the largest shift of a mean, in steps."""
        count, largest = 0, 0.0
        for name, site, q in quantizers(model):
            if site != "weight":
                continue
            layer = model.get_submodule(name)
            if q.gain is not None:
                raise QexpError(
                    f"{name} ({site}): corrected twice; list weight_correction once, or let quantizers not do it themselves"
                )
            w, axis = weight_of(layer, site).double(), channel_axis(layer, site)
            before = q(w.float()).double()
            transposed = isinstance(layer, nn.ConvTranspose2d)
            rows, quantized = (
                arranged(layer, t).flatten(0, 1).flatten(1) if transposed else t.movedim(axis, 0).flatten(1)
                for t in (w, before)
            )
            corrections = FORMS[self.form](rows, quantized)
            if transposed:  # [O] -> [I, O/g, 1, 1], alike for all input channels of a group
                q.correct(*(_of_groups(layer, c) for c in corrections))
            else:
                shape = [-1 if d == axis else 1 for d in range(w.ndim)]
                q.correct(*(c.reshape(shape) for c in corrections))
            shift = (rows.mean(1) - quantized.mean(1)).abs() / torch.as_tensor(q.scale).double().mean()
            count, largest = count + 1, max(largest, float(shift.max()))
        if not count:
            raise QexpError(
                "weight_correction: no layer has a quantized weight; give weights bits, or leave the pass out"
            )
        context.findings |= {"corrected_weights": count, "largest_mean_shift": round(largest, 4)}


def _of_groups(layer: nn.ConvTranspose2d, values: Tensor) -> Tensor:
    """Returns a value for each output channel of a transposed convolution in a shape that broadcasts against its weight."""
    if layer.groups == 1:
        return values.reshape(1, -1, 1, 1)
    return values.reshape(layer.groups, -1).repeat_interleave(layer.in_channels // layer.groups, 0)[..., None, None]
