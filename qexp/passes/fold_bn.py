"""Batch norm folded into the convolution before it."""

from __future__ import annotations

import logging
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from qexp.errors import QexpError
from qexp.layers.calls import calls, stand_in
from qexp.layers.quantized import COMPUTES_AS
from qexp.network.facts import Facts
from qexp.passes.tied import untie

log = logging.getLogger(__name__)


@dataclass
class Normal:
    """The distribution of a folded batch norm's result: mean beta and standard deviation |gamma| of each channel, `[C]`."""

    mean: Tensor
    std: Tensor


@torch.no_grad()
def fold_bn(model: nn.Module, facts: Facts) -> dict[str, Normal]:
    """Folds every batch norm into its convolution, in place; the float output does not change.

    Returns the distribution of each convolution's results, as recorded in the batch norm.

    `W' = W gamma / sqrt(var + eps)` for each output channel, `b' = beta + (b - mean) gamma / sqrt(var + eps)`; the batch norm becomes
    `nn.Identity`. Pairs come from the graph, so grouped, depthwise and transposed convolutions and any naming are handled. A weight that
    other layers hold too becomes the convolution's own first. Of a subclass of a batch norm, the call that normalises is folded, and what
    it does besides (an activation) stays. Left alone are batch norms that normalise by the batch in evaluation too
    and layers with a `forward` of their own.

    Raises:
        QexpError: The model could not be traced, so pairs are unknown.
    """
    if facts.trace_error:
        raise QexpError(
            f"bn=fold needs to know which convolution each batch norm follows, but {type(model).__name__} cannot be traced "
            f"({facts.trace_error}); use bn=keep"
        )
    folded: dict[str, Normal] = {}
    for conv_name, bn_name in facts.bn_of.items():
        conv, bn = model.get_submodule(conv_name), model.get_submodule(bn_name)
        if bn.running_mean is None or bn.running_var is None or not (_is_plain(conv) and _is_plain(bn)):
            continue
        if others := untie(model, conv_name, "weight"):
            log.info(
                "%s shares its weight with %s; it gets its own, since its batch norm is folded",
                conv_name,
                ", ".join(others),
            )
        gamma = bn.weight if bn.affine else torch.ones_like(bn.running_mean)
        beta = bn.bias if bn.affine else torch.zeros_like(bn.running_mean)
        factor = gamma.double() / torch.sqrt(bn.running_var.double() + bn.eps)
        weight = conv.weight.double()
        if isinstance(conv, nn.ConvTranspose2d):
            grouped = weight.reshape(conv.groups, -1, *weight.shape[1:])
            scaled = grouped * factor.reshape(conv.groups, 1, -1, *[1] * (weight.ndim - 2))
            weight = scaled.reshape(weight.shape)
        else:
            weight = weight * factor.reshape(-1, *[1] * (weight.ndim - 1))
        bias = conv.bias.double() if conv.bias is not None else 0.0
        bias = beta.double() + (bias - bn.running_mean.double()) * factor
        conv.weight.copy_(weight)
        conv.bias = nn.Parameter(bias.to(conv.weight.dtype))
        folded[conv_name] = Normal(beta.detach().clone(), gamma.detach().abs())
        parent, _, leaf = bn_name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, nn.Identity())
    return folded


def is_unfolded(module: nn.Module) -> bool:
    """Whether a module is a batch norm that still normalises; a subclass with an activation stays where its norm is folded."""
    inside = [type(stand_in(module, name)) for name, call in calls(module).items() if call.kind == "batch_norm"]
    return isinstance(module, nn.modules.batchnorm._BatchNorm) and nn.Identity not in inside


def _is_plain(layer: nn.Module) -> bool:
    """Whether a layer computes the same as torch's layer of its type."""
    return COMPUTES_AS in vars(layer) or type(layer).forward.__module__.startswith("torch.nn.modules.")
