"""Cost of a network: parameters, multiply-accumulates, bit operations, bytes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from torch import nn

from qexp.layers.quantized import WEIGHTED, float_class
from qexp.network.facts import Facts
from qexp.numerics.widths import FLOAT


@dataclass(frozen=True)
class LayerCost:
    """Cost of one weighted layer for one image: number of weights, multiply-accumulates, elements of its input.

    For a layer that is called more than once, weights count once, and the products and inputs of all calls count.
    """

    weights: int
    macs: int
    inputs: int


@dataclass(frozen=True)
class Cost:
    """Cost of a network for one image.

    Attributes:
        params: Parameters of the float network.
        macs: Multiply-accumulates of convolutions and linear layers, and of products outside such layers.
        bops: Bit operations, the sum of MACs x weight bits x input bits.
        weight_bytes, weight_bytes_float: Bytes of the weights of convolutions and linear layers, at their bits and at 32 bits (scales
            not counted).
        mean_wbit, mean_abit: Mean number of bits per weight and per input element.
    """

    params: int
    macs: int
    bops: int
    weight_bytes: int
    weight_bytes_float: int
    mean_wbit: float
    mean_abit: float


def layer_costs(model: nn.Module, facts: Facts) -> dict[str, LayerCost]:
    """Returns the cost of every convolution and linear layer, from the recorded shapes of all its calls."""
    out = {}
    for name in facts.order:
        layer = model.get_submodule(name)
        if not issubclass(float_class(layer), WEIGHTED):
            continue
        macs = inputs = 0
        for shapes in facts.every_call[name]:
            given = shapes.get("input") or shapes["input.0"]
            # each element of the result (for a transposed convolution: of the input) is multiplied with every weight of its channel
            transposed = issubclass(float_class(layer), nn.ConvTranspose2d)
            macs += math.prod(given if transposed else shapes["output"]) * math.prod(layer.weight.shape[1:])
            inputs += math.prod(given)
        out[name] = LayerCost(layer.weight.numel(), macs // facts.images, inputs // facts.images)
    return out


def quantized_macs(
    layers: Mapping[str, LayerCost],
    outside: Mapping[str, int],
    wbits: Mapping[str, int],
    abits: Mapping[str, int],
    operands: Mapping[tuple[str, int], int] = MappingProxyType({}),
) -> tuple[float, list[str]]:
    """Returns the percentage of products with a quantized factor, and the layers that compute the others, largest first.

    Args:
        layers: Cost of each weighted layer.
        outside: Multiply-accumulates outside the weighted layers, by name.
        wbits, abits: Bits of the weight and of the input of each layer; 32 where not named.
        operands: Bits of each operand of products of two tensors, by (layer, number); 32 where not named.
    """
    macs = {name: c.macs for name, c in layers.items()} | dict(outside)
    factors = {n: (wbits.get(n, FLOAT), abits.get(n, FLOAT)) for n in layers}
    factors |= {n: _factor_bits(n, operands) for n in outside}
    left = [n for n in macs if min(factors[n]) >= FLOAT]
    total = sum(macs.values())
    missing = sum(macs[n] for n in left)
    return 100 * (total - missing) / max(total, 1), sorted(left, key=lambda n: -macs[n])


def _factor_bits(product: str, operands: Mapping[tuple[str, int], int]) -> tuple[int, int]:
    """Returns the bits of both factors of a product of activations, which is named after its layer: `attn.matmul (matmul)`."""
    layer = product.rpartition(" (")[0]
    return operands.get((layer, 0), FLOAT), operands.get((layer, 1), FLOAT)


def params(model: nn.Module) -> int:
    """Returns the number of parameters of a float network."""
    return sum(p.numel() for p in model.parameters())


def cost(
    layers: Mapping[str, LayerCost],
    wbits: Mapping[str, int],
    abits: Mapping[str, int],
    params: int,
    others: Mapping[str, int] = MappingProxyType({}),
    operands: Mapping[tuple[str, int], int] = MappingProxyType({}),
) -> Cost:
    """Returns the cost of a network whose layers have these weight and input bits (32 where not named).

    Args:
        layers: Cost of each weighted layer.
        wbits, abits: Bits of the weight and of the input of each layer.
        params: Parameters of the float network.
        others: Multiply-accumulates outside the weighted layers, by name.
        operands: Bits of each operand of products of two tensors, by (layer, number); others are computed in float.
    """
    w = {name: wbits.get(name, FLOAT) for name in layers}
    a = {name: abits.get(name, FLOAT) for name in layers}
    weights, inputs = sum(c.weights for c in layers.values()), sum(c.inputs for c in layers.values())
    outside = sum(n * math.prod(_factor_bits(name, operands)) for name, n in others.items())
    weight_bits = sum(c.weights * w[n] for n, c in layers.items())
    return Cost(
        params=params,
        macs=sum(c.macs for c in layers.values()) + sum(others.values()),
        bops=sum(c.macs * w[n] * a[n] for n, c in layers.items()) + outside,
        weight_bytes=math.ceil(weight_bits / 8),
        weight_bytes_float=weights * 4,
        mean_wbit=weight_bits / max(weights, 1),
        mean_abit=sum(c.inputs * a[n] for n, c in layers.items()) / max(inputs, 1),
    )
