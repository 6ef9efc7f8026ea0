"""Expected-input bias correction: subtracts from the bias the mean shift that rounded weights cause in each output."""

from __future__ import annotations

import logging
import math
from typing import Any, Literal

import torch
from torch import Tensor, nn

from qexp.errors import QexpError
from qexp.layers.quantized import WEIGHTED, Quantized, activation_axis, operands, quantized_layers
from qexp.layers.swap import evaluating
from qexp.layers.weight_channels import channels, response
from qexp.passes.base import Pass, PassContext
from qexp.passes.tied import untie
from qexp.quantizers.base import Quantizer
from qexp.statistics.stats import TensorStats
from qexp.system.within import hooked

log = logging.getLogger(__name__)

MODES = ("empirical", "analytic")


def relu_mean(mean: Tensor, std: Tensor) -> Tensor:
    """Returns `E[relu(x)]` of normal x: `std phi(mean/std) + mean Phi(mean/std)`, float64.

    >>> [round(float(relu_mean(torch.tensor(b), torch.tensor(g))), 6) for b, g in ((0.5, 1.2), (0.0, 1.0))]
    [0.769696, 0.398942]
    """
    mean, std = mean.double(), std.double()
    z = mean / std.clamp_min(1e-300)
    density = torch.exp(-z.square() / 2) / math.sqrt(2 * math.pi)
    return torch.where(std > 0, std * density + mean * torch.special.ndtr(z), mean.clamp_min(0))


class BiasCorrection(Pass):
    """Subtracts `sum (W_q - W)[o, i, kh, kw] E[x_i]` from the bias of every layer with quantized weights, first to last.

    One forward pass of the quantized network over the calibration images corrects each layer just before the layer runs, so that
    its inputs come from corrected layers. A layer without a bias gets one. A quantizer on the bias is fitted again. Layers whose
    batch norm was measured again after quantization have no shift left and are skipped.

    Args:
        mode: Where E[x_i] comes from: `empirical`, the mean of the layer's quantized input channel; `analytic`, the folded batch norm
            and the ReLU before the layer (empirical if none is known, such as behind adds and pools).
        images: How many calibration images are run, in one batch.

    Source: Nagel et al. 2019 (arXiv 1906.04721), section 4.2 and equations 17-19.
    Differs from the paper: `empirical` weighs E[x_i] of the quantized input; padding at the borders is ignored.
    Their appendix D, which matches each layer's mean result to the float network's, is not offered: on ResNet-20 it was worse at
    every width (W4A8 90.85 against 91.36 %, W3A8 58.6 against 85.1 %).
    """

    def __init__(self, mode: Literal["empirical", "analytic"] = "empirical", images: int = 128) -> None:
        if mode not in MODES:
            raise QexpError(f"BiasCorrection(mode={mode!r}) is not allowed; use {' or '.join(MODES)}")
        if images < 1:
            raise QexpError(f"BiasCorrection(images={images}) is not allowed; use 1 or more")
        self.mode, self.images = mode, images

    @torch.no_grad()
    def on_fitted(self, model: nn.Module, context: PassContext) -> None:
        """Corrects the biases; reports how many, and the largest shift in standard deviations of its output channel."""
        settled = context.facts.bn_of if "reestimated_norms" in context.findings else {}
        layers = {
            name: layer
            for name, layer in quantized_layers(model)
            if isinstance(layer, WEIGHTED) and isinstance(layer.weight_quantizer, Quantizer) and name not in settled
        }
        if not layers:
            raise QexpError("bias_correction: no layer has quantized weights; give weights bits, or leave the pass out")
        images = torch.cat(list(context.images))[: self.images]
        done: dict[str, float] = {}
        analytic = 0

        def before(name: str):
            def hook(layer: Quantized, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
                nonlocal analytic
                if name in done:
                    return  # a layer that runs several times keeps its first correction
                mean = known_input(name, model, context) if self.mode == "analytic" else None
                analytic += mean is not None
                if mean is None:
                    x = operands(args, kwargs)[0]
                    mean = channel_mean(layer.input_quantizer(x), activation_axis(layer, x.ndim))
                error = layer.quantized_weight().double() - layer.weight.double()
                untie(model, name, "bias")  # each layer has its own error to subtract
                done[name] = _shift(layer, -response(layer, error, mean), name, context)

            return hook

        watching = hooked(q.register_forward_pre_hook(before(n), with_kwargs=True) for n, q in layers.items())
        with evaluating(model), watching:
            model(images)
        largest = max(done, key=done.__getitem__)
        log.info(
            "bias correction: %d biases, the largest shift %.3f of its channel's spread (%s)",
            len(done),
            done[largest],
            largest,
        )
        context.findings |= {"corrected_biases": len(done), "largest_bias_shift": round(done[largest], 4)}
        if self.mode == "analytic":
            log.info(
                "bias correction: %d of %d input means come from batch norms, the others were measured",
                analytic,
                len(done),
            )
            context.findings["analytic_inputs"] = analytic


def channel_mean(x: Tensor, axis: int = 1) -> Tensor:
    """Returns the mean of each channel of `[N, C, ...]`, or of a tensor with its channels along another axis, float64 `[C]`."""
    return x.double().mean([d for d in range(x.ndim) if d != axis])


def known_input(name: str, model: nn.Module, context: PassContext) -> Tensor | None:
    """Returns E[x] of each input channel of a layer, from the folded batch norm before it; None if that does not determine it."""
    operands = context.facts.sources.get(name, ())
    chain = operands[0] if operands else ()
    # The search does not pass a ReLU6 or a module that replaced one.
    if chain and isinstance(model.get_submodule(chain[-1]), nn.ReLU | nn.ReLU6):
        inner = context.facts.sources.get(chain[-1], ())
        chain += inner[0] if inner else ()
    normal = context.folded.get(chain[-1]) if chain else None
    # a layer that runs several times has several predecessors, and the graph names only one of them
    if normal is None or any(
        context.facts.calls.get(part, 1) > 1 for part in chain if isinstance(model.get_submodule(part), nn.ReLU6)
    ):
        return None
    taken, shape = channels(model.get_submodule(name))[1], context.facts.shapes[name].get("input", ())
    if len(normal.mean) != taken or shape[1:2] != (taken,):
        return None  # flattened maps, or a linear layer over positions
    between = [model.get_submodule(part) for part in chain[:-1]]
    if not all(isinstance(m, nn.Identity | nn.Dropout | nn.ReLU | nn.ReLU6) for m in between):
        return None
    if any(isinstance(m, nn.ReLU6) for m in between):
        return relu_mean(normal.mean, normal.std) - relu_mean(normal.mean - 6, normal.std)
    # a ReLU follows, even where other layers read the result too
    if name in context.facts.rectified or chain[-1] in context.facts.followed_by_relu:
        return relu_mean(normal.mean, normal.std)
    return normal.mean.double()


def _shift(layer: Quantized, change: Tensor, name: str, context: PassContext) -> float:
    """Adds `change` `[O]` to a layer's bias; returns the largest change in standard deviations of its channel's float result."""
    change = change.to(layer.weight)
    if layer.bias is None:
        layer.bias = nn.Parameter(change.clone())
    else:
        layer.bias.add_(change)
    if isinstance(layer.bias_quantizer, Quantizer):
        layer.bias_quantizer.fit(TensorStats.of(layer.bias, layer.bias_quantizer.granularity))
    seen = context.calibration[name, "output"].channel.std.to(change) if context.calibration is not None else None
    if seen is None:
        return float(change.abs().max())
    return float((change.abs() / seen.clamp_min(1e-12)).where(seen > 0, 0.0).max())
