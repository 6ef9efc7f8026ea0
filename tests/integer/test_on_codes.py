"""Evaluation on codes: the simulation's own products, exact; what cannot be so is named and stays as it is."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from qexp.integer import int8
from qexp.integer.on_codes import on_codes
from qexp.layers.quantized import QuantConv2d, quantizers
from qexp.layers.swap import baked_weights

pytestmark = pytest.mark.skipif(not int8.available(127), reason="no 8-bit dot products")
ASYMMETRIC = {"_target_": "qexp.quantizers.uniform.Uniform", "symmetric": False, "granularity": "tensor"}


class Net(nn.Module):
    """Strides, dilation, groups, a depthwise layer, a layer without bias and two linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, 8, 3, padding=1, stride=2)
        self.b = nn.Conv2d(8, 12, (3, 1), padding=(2, 0), dilation=(2, 1), groups=4, bias=False)
        self.c, self.d = nn.Conv2d(12, 12, 3, padding=1, groups=12), nn.Conv2d(12, 16, 1)
        self.e, self.f = nn.Linear(16, 10), nn.Linear(10, 5)
        self.relu = nn.ReLU()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.d(self.relu(self.c(self.b(self.relu(self.a(x))))))
        return self.f(self.e(x.mean((2, 3))))


def exactly(model: nn.Module, images: torch.Tensor) -> torch.Tensor:
    """Returns the network's results with the sums of its layers in float64: the values that both ways round."""
    before = QuantConv2d.compute

    def double(self, x, weight, bias):
        bias = None if bias is None else bias.double()
        return self._conv_forward(x.double(), weight.double(), bias).float()

    QuantConv2d.compute = double
    try:
        return model(images)
    finally:
        QuantConv2d.compute = before


@torch.no_grad()
@pytest.mark.parametrize(("wbit", "abit"), [(8, 8), (4, 4), (2, 6)])
@pytest.mark.parametrize(
    "inputs", [{}, ASYMMETRIC | {"signed": True}, ASYMMETRIC | {"symmetric": True}], ids=["", "signed", "symmetric"]
)
def test_results_are_the_simulation_s_but_for_the_rounding_of_sums(quantize, wbit, abit, inputs):
    torch.manual_seed(0)
    model, images = quantize(Net(), wbit, abit, **({"input": inputs} if inputs else {}))
    seen: dict[str, list[torch.Tensor]] = {}
    hooks = [
        q.register_forward_pre_hook(lambda m, given, key=f"{name}.{site}": seen.setdefault(key, []).append(given[0]))
        for name, site, q in quantizers(model)
        if site == "input" and name != "a"
    ]
    model.b.input_quantizer.zero_point  # noqa: B018 -- it has one, and the border is padded with it
    plain = exactly(model, images)
    with baked_weights(model), on_codes(model, images[:1]) as found:
        assert found.layers == list("abcdef") and not found.others and found.share == 1
        result = model(images)
    for hook in hooks:
        hook.remove()
    assert "forward" not in vars(model.a) and torch.equal(exactly(model, images), plain)
    torch.testing.assert_close(result, plain, rtol=1e-3, atol=2e-2 if wbit < 8 else 2e-3)
    own = torch.equal(model.a(images), model.a(images))
    with on_codes(model, images[:1]):
        close = model.a(images)
    assert own and (close - model.a(images)).abs().max() <= 2e-6 * model.a(images).abs().max() + 1e-6


@torch.no_grad()
def test_codes_behind_a_layer_differ_only_where_its_sums_lie_at_a_border(quantize):
    """Each code that differs belongs to a number within float32's rounding of the border between two codes."""
    torch.manual_seed(1)
    model, images = quantize(
        nn.Sequential(nn.Conv2d(3, 64, 3, padding=1), nn.Conv2d(64, 64, 3), nn.Conv2d(64, 8, 3)), 4, 4
    )
    first, second, third = model
    x = first(images)
    float_sums = second(x)
    with on_codes(model, images[:1]):
        on = second(x)
    quantizer = third.input_quantizer
    differ = quantizer.codes(float_sums) != quantizer.codes(on)
    place = float_sums.double() / quantizer.scale.double() + quantizer.zero_point
    to_border = ((place - place.floor()) - 0.5).abs()
    assert differ.float().mean() < 1e-3 and (differ.sum() == 0 or to_border[differ].max() < 1e-4)
    exact = second._conv_forward(
        second.input_quantizer(x).double(), second.quantized_weight().double(), second.bias.double()
    )
    ours, theirs = (float((y.double() - exact).abs().max()) for y in (on, float_sums))
    assert ours <= theirs, "scales and bias round once"


@torch.no_grad()
def test_what_stays_in_floating_point_is_named_with_its_reason(quantize):
    channel = {"_target_": "qexp.quantizers.uniform.Uniform", "granularity": "channel"}
    rules = {
        "wide": {"layers": "a", "input": {"bits": 12}},
        "float": {"layers": "b", "input": None},
        "channels": {"layers": "c", "input": channel},
        "levels": {"layers": "d", "weight": {"_target_": "qexp.quantizers.kmeans.KMeans", "bits": 4}},
        "real": {"layers": "e", "weight": {"_target_": "qexp.quantizers.dorefa.DoReFaWeight"}},  # odd codes to 255
    }
    torch.manual_seed(0)
    model, images = quantize(Net(), 8, 8, rules=rules)
    plain = model(images)
    with baked_weights(model), on_codes(model, images[:1]) as found:
        torch.testing.assert_close(model(images), plain, rtol=1e-4, atol=1e-4)
    assert found.layers == ["f"] and 0 < found.share < 0.1
    words = ("more than 8 bits", "not quantized", "per channel", "weight", "weight")
    assert all(word in found.others[name] for name, word in zip("abcde", words, strict=True)), found.others
    assert "% of the products on codes; in floating point a: its input has more than 8 bits" in found.line()


@torch.no_grad()
def test_an_error_inside_leaves_the_network_as_it_was(quantize):
    model, images = quantize(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3)))
    plain = model(images)
    with pytest.raises(ZeroDivisionError), on_codes(model, images[:1]):
        raise ZeroDivisionError
    assert torch.equal(model(images), plain) and not any("forward" in vars(m) for m in model.modules())


def _products_in_float64(layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """Returns the sums of a layer's quantized input and weight in float64, plus its bias."""
    values, weight = layer.input_quantizer(x).double(), layer.quantized_weight().double()
    bias = None if layer.bias is None else layer.bias.double()
    if isinstance(layer, nn.Linear):
        return nn.functional.linear(values, weight, bias)
    return nn.functional.conv2d(values, weight, bias, layer.stride, layer.padding, layer.dilation, layer.groups)


DOREFA = {"_target_": "qexp.quantizers.dorefa.DoReFaWeight"}
NO_CODE_FOR_ZERO = {
    "dorefa 7": (7, DOREFA | {"rescale": "max"}),
    "dorefa 4": (4, DOREFA),
    "dorefa 2": (2, DOREFA | {"rescale": "max"}),
    "dorefa 1": (1, DOREFA),
    "dorefa symmetric": (5, DOREFA | {"variant": "symmetric", "rescale": "max"}),
    "sawb": (3, {"_target_": "qexp.quantizers.sawb.SAWB"}),
    "bwn": (1, {"_target_": "qexp.quantizers.bwn.BWN", "granularity": "channel"}),
}


@torch.no_grad()
@pytest.mark.parametrize("kind", NO_CODE_FOR_ZERO)
def test_weights_without_a_code_for_zero_are_on_codes_of_half_a_step(quantize, kind):
    """Their levels are odd multiples of half a step; rounding of the levels themselves is float32's too."""
    wbit, weight = NO_CODE_FOR_ZERO[kind]
    torch.manual_seed(3)
    model, images = quantize(Net(), wbit, 6, weight=weight)
    with on_codes(model, images[:1]) as found:
        assert found.layers == list("abcdef") and found.share == 1 and "100.0 %" in found.line()
    inputs = {"a": images}
    for name in "bcdef":
        layer = model.get_submodule(name)
        inputs[name] = torch.randn(4, layer.in_features) if name in "ef" else torch.randn(4, layer.in_channels, 9, 9)
    for name, x in inputs.items():
        layer = model.get_submodule(name)
        with baked_weights(model):
            exact, plain = _products_in_float64(layer, x), layer(x)
            with on_codes(model, images[:1]):
                ours = layer(x)
        most = exact.abs().max()
        assert (ours - exact).abs().max() <= 3e-7 * most, name
        torch.testing.assert_close(ours, plain, rtol=0, atol=float(2e-6 * most))


@torch.no_grad()
def test_weights_of_eight_bits_without_a_code_for_zero_stay_in_floating_point(quantize):
    model, images = quantize(Net(), 8, 8, weight=DOREFA | {"rescale": "max"})
    with on_codes(model, images[:1]) as found:
        assert not found.layers and set(found.others.values()) == {"its weight has more than 8 bits"}


def test_one_bit_weights_of_dorefa_are_their_two_levels_to_the_bit_while_training():
    """`w + (level - w)` rounds, so that a weight would be near its level only."""
    from qexp.quantizers.dorefa import DoReFaWeight

    torch.manual_seed(0)
    quantizer, weight = DoReFaWeight(1, (64, 33)), torch.randn(64, 33, requires_grad=True)
    value = quantizer(weight)
    assert torch.equal(value.detach(), quantizer.dequantize(quantizer.codes(weight))) and len(value.unique()) == 2
    value.sum().backward()
    assert torch.equal(weight.grad, torch.ones_like(weight))


SCRIPT = """
import torch
from torch import nn
from qexp.integer import int8
from qexp.integer.code_layer import Refused, check_sums
assert int8.available(127) and not int8.available()
weight = torch.full((2, 3, 3, 3), 127, dtype=torch.int8)
check_sums(weight, 0, 127)
check_sums(weight // 2, -128, 127)
for low, high in ((0, 255), (-128, 127)):
    try:
        check_sums(weight, low, high)
    except Refused as reason:
        print(reason)
"""


@pytest.mark.slow
@pytest.mark.skipif(not int8.available(), reason="no 8-bit dot products to do without")
def test_a_processor_without_dot_products_keeps_wide_codes_in_floating_point():
    environment = os.environ | {"ONEDNN_MAX_CPU_ISA": "AVX2"}
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", SCRIPT], cwd=root, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.count("codes of inputs up to 127 are exact") == 2, done.stderr[-2000:]
