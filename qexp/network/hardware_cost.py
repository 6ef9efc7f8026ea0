"""Hardware cost of a network for one image: bytes, energy, multiplier slices. Each estimate is computed from counts and has a source."""

from __future__ import annotations

import math
from collections.abc import Mapping
from types import MappingProxyType

from torch import nn

from qexp.layers.quantized import quantizers, weight_of
from qexp.network.cost import LayerCost, layer_costs
from qexp.network.facts import Facts
from qexp.numerics.widths import FLOAT

_MULTIPLY_8, _ADD_32, _MULTIPLY_FLOAT, _ADD_FLOAT = 0.2, 0.1, 3.7, 0.9  # pJ
_READ_BIT = 20 / 64  # pJ


def hardware(
    model: nn.Module,
    facts: Facts,
    wbits: Mapping[str, int],
    abits: Mapping[str, int],
    obits: Mapping[str, int],
    operands: Mapping[tuple[str, int], int] = MappingProxyType({}),
) -> dict[str, int | float | None]:
    """Returns the hardware columns of a point's record.

    Args:
        model: The network with its quantizers.
        facts: Structure of the model.
        wbits, abits, obits: Bits of each layer's weight, input and output; 32 where not named.
        operands: Bits of each operand of layers that have several, by (layer, number); `abits` where not named.
    """
    layers = layer_costs(model, facts)
    energy = sum(mac_energy(wbits.get(n, FLOAT), abits.get(n, FLOAT)) * c.macs for n, c in layers.items())
    return {
        "packed_bytes": packed_bytes(model, layers, wbits),
        "activation_bytes_peak": activation_bytes_peak(facts, abits, obits, operands),
        "energy_mac_uj": round(energy / 1e6, 6),
        "energy_read_uj": round(read_energy(layers, wbits, abits) / 1e6, 6),
        "dsp_cycles": dsp_cycles(layers, wbits, abits),
    }


def packed_bytes(model: nn.Module, layers: Mapping[str, LayerCost], wbits: Mapping[str, int]) -> int:
    """Returns the bytes of the weights, packed layer by layer at their bits, plus four bytes per scale and per bias."""
    total = 0
    for name, layer in layers.items():
        total += math.ceil(layer.weights * wbits.get(name, FLOAT) / 8)
        bias = getattr(model.get_submodule(name), "bias", None)
        total += 0 if bias is None else 4 * bias.numel()
    for name, site, q in quantizers(model):
        if site == "weight" and name in layers and weight_of(model.get_submodule(name), site) is not None:
            total += 4 * getattr(q.scale, "numel", lambda: 1)()
    return total


def activation_bytes_peak(
    facts: Facts,
    abits: Mapping[str, int],
    obits: Mapping[str, int],
    operands: Mapping[tuple[str, int], int] = MappingProxyType({}),
) -> int:
    """Returns the peak number of activation bytes in memory while layers run one after another.

    A tensor is in memory from the layer that computes it to the last layer that reads it (a residual one through its whole block). Its
    width is that of the quantizer on its producer's output, or else the widest of the quantizers on its readers' inputs; 32 bits where
    one reader takes it in float. A batch norm after a convolution, ReLUs and max-pools count as part of the layer before them. Where the
    network has no graph, only each layer's own input and output count.
    """
    made_by = dict(facts.bn_of)
    passing = {name for chains in facts.sources.values() for chain in chains for name in chain[:-1]}
    order = [name for name in facts.order if name not in passing and name not in made_by.values()]
    size: dict[str, int] = {}
    width: dict[str, int] = {}
    last: dict[str, int] = {}
    for i, name in enumerate(order):
        shapes = facts.shapes[name]
        chains = facts.sources.get(name) or ((),) * sum(site.startswith("input") for site in shapes)
        for k, chain in enumerate(chains):
            maker = chain[-1] if chain else f"into {name} {k}" if facts.trace_error else "the image"
            shape = shapes.get("input") or shapes.get(f"input.{k}")
            if shape is None:
                continue
            bits = operands.get((name, k), abits.get(name, FLOAT))
            size[maker] = max(size.get(maker, 0), math.prod(shape) // facts.images)
            width[maker] = max(
                width.get(maker, 0), obits.get(maker, FLOAT) if obits.get(maker, FLOAT) < FLOAT else bits
            )
            last[maker] = i
    peak = 0.0
    for i, name in enumerate(order):
        result = made_by.get(name, name)
        born = {result: i}
        shape = facts.shapes[name].get("output")
        if result not in size and shape is not None:  # the network's own result
            size[result], width[result], last[result] = math.prod(shape) // facts.images, FLOAT, i
        alive = [m for m, end in last.items() if end >= i and _index(m, order, made_by, born) <= i]
        peak = max(peak, sum(size[m] * width[m] / 8 for m in alive))
    return math.ceil(peak)


def _index(maker: str, order: list[str], made_by: Mapping[str, str], born: Mapping[str, int]) -> int:
    """Returns the step at which a tensor is created; a network input exists from its reader on (no graph) or from the start."""
    if maker in born:
        return born[maker]
    if maker.startswith("into "):
        return order.index(maker.split()[1])
    makers = {made_by.get(name, name): i for i, name in enumerate(order)}
    return makers.get(maker, 0)


def mac_energy(wbits: int, abits: int) -> float:
    """Returns the picojoules of a multiply-accumulate in 45 nm at 0.9 V: a product and an addition into 32 bits.

    An 8 x 8 bit product takes 0.2 pJ and grows with the product of the widths (so 32 x 32 is 3.2 where 3.1 was measured). A 32-bit
    addition takes 0.1 pJ. With a float operand, both count as 32-bit float operations: 3.7 and 0.9 pJ.

    Source: Horowitz 2014, Computing's energy problem (and what we can do about it), ISSCC, figure 1.1.9.
    Differs from the paper: widths between those measured are interpolated as above.
    """
    if max(wbits, abits) >= FLOAT:
        return _MULTIPLY_FLOAT + _ADD_FLOAT
    return _MULTIPLY_8 * wbits * abits / 64 + _ADD_32


def read_energy(layers: Mapping[str, LayerCost], wbits: Mapping[str, int], abits: Mapping[str, int]) -> float:
    """Returns the picojoules of reading each weight, and each layer's input per call, once from a 32 KiB cache: 20 pJ per 64 bits.

    Main memory (about a hundred times as much per bit), writing, and repeated reading are not counted.

    Source: Horowitz 2014, as for `mac_energy`.
    """
    bits = sum(c.weights * wbits.get(n, FLOAT) + c.inputs * abits.get(n, FLOAT) for n, c in layers.items())
    return bits * _READ_BIT


def dsp_cycles(layers: Mapping[str, LayerCost], wbits: Mapping[str, int], abits: Mapping[str, int]) -> int | None:
    """Returns the clock cycles that one DSP48E2 slice needs for all products; None where a layer computes in float.

    Its 27 x 18 bit multiplier computes per cycle four products of up to 4 x 4 bits, or two of up to 8 x 8 that share an operand, or one.

    Source: Xilinx white papers WP521 (2020), Convolutional Neural Network with INT4 Optimization on Xilinx Devices, and WP486 (2016),
    Deep Learning with INT8 Optimization on Xilinx Devices.
    """
    total = 0
    for name, layer in layers.items():
        widest = max(wbits.get(name, FLOAT), abits.get(name, FLOAT))
        if widest >= FLOAT:
            return None
        total += math.ceil(layer.macs / (4 if widest <= 4 else 2 if widest <= 8 else 1))
    return total
