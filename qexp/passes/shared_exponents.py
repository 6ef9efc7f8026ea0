"""Gives tensors that are added to each other one exponent vector, so that the sum is plain integer arithmetic."""

from __future__ import annotations

import logging
from functools import reduce
from typing import Literal

import torch
from torch import nn

from qexp.errors import QexpError
from qexp.layers.quantized import float_class
from qexp.models.modules import Add
from qexp.network.facts import Facts
from qexp.network.quantizer_before import arriving, at_output
from qexp.passes.base import Pass, PassContext
from qexp.quantizers.caq import CAQShift

log = logging.getLogger(__name__)
_UNASKED = 1 << 20  # above any exponent: marks a channel that needs none


def residual_groups(model: nn.Module, facts: Facts) -> list[list[CAQShift]]:
    """Returns the quantizers of tensors that are added to each other, one list per connected set, in order of execution.

    A stage of a residual network, whose additions feed one another, is one group.
    """
    groups: list[list[CAQShift]] = []
    for name in facts.order:
        if not issubclass(float_class(model.get_submodule(name)), Add):
            continue
        met = [arriving(model, facts, name, i) for i in range(2)] + [at_output(model, name)]
        met = [q for q in met if isinstance(q, CAQShift)]
        joined = [g for g in groups if any(q is other for q in met for other in g)]
        groups = [g for g in groups if not any(g is j for j in joined)]
        members = {id(q): q for q in [*(q for g in joined for q in g), *met]}
        if members:
            groups.append(list(members.values()))
    return groups


class SharedExponents(Pass):
    """Gives every residual group the element-wise least of its exponents (`min`), or those of its last addition (`last`).

    A channel that was zero throughout needs no exponent and does not lower the others' (`zero_channels` of `CAQShift`).

    Args:
        take: `min` lets nothing saturate that did not before; `last` is what TF2-Engine does.

    Source: TF2-Engine's CNN Activation Quantization, its manual's rule for residual networks.
    """

    def __init__(self, take: Literal["min", "last"] = "min") -> None:
        if take not in ("min", "last"):
            raise QexpError(f"SharedExponents(take={take!r}): allowed are min, last")
        self.take = take

    def on_fitted(self, model: nn.Module, context: PassContext) -> None:
        groups = residual_groups(model, context.facts)
        for group in groups:
            share(group, self.take)
        log.info("shared exponents: %d residual groups of %s tensors", len(groups), [len(g) for g in groups])
        context.findings["shared_exponents"] = len(groups)


def share(group: list[CAQShift], take: str = "min") -> None:
    """Gives all quantizers of a group one exponent vector, in place; a channel without an exponent takes the others'."""
    if len({q.scale.numel() for q in group}) > 1:
        names = ", ".join(f"{q.name} {q.scale.numel()}" for q in group)
        raise QexpError(f"tensors that meet in an addition have different numbers of exponents: {names}")
    vectors = [q.exponents for q in group]
    if take == "last":
        shared = vectors[-1]
    else:
        asked = [torch.where(q.counted.to(v.device), v, _UNASKED) for q, v in zip(group, vectors)]
        shared = reduce(torch.minimum, asked)
        shared = torch.where(shared == _UNASKED, 0, shared)
    for q in group:
        q.set_exponents(shared)
