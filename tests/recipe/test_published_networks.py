"""PACT-Quantization's networks, computed from its published formulas, against the recipes that place its quantizers."""

from __future__ import annotations

import pytest
import torch
from hydra.utils import instantiate
from torch import Tensor, nn
from torch.nn import functional as F

from qexp.calibration.calibrate import calibrate
from qexp.network.facts import facts
from qexp.recipe import apply, resolve
from qexp.run import pipeline
from qexp.run.settings import read

METHODS = ("dorefa", "pact", "mpact")
PUBLISHED = {
    "dorefa": ["quant.weight.rescale=none", "quant.input.unscale=false"],
    "pact": ["quant.weight.rescale=none", "quant.input.range=10"],
    "mpact": ["quant.weight.rescale=none", "quant.input.range=10"],
}
SIX = "++quant.rules.six={layers: [bn1, bn2, pool], output: {range: 6.0}}"


class Reference:
    """The quantizers as published: `a(x, bits)` for activations, `w(layer, bits)` for the weight of a layer."""

    def __init__(self, method: str) -> None:
        self.method = method

    def a(self, x: Tensor, bits: int, alpha: float = 10.0) -> Tensor:
        if bits == 32:
            return x
        if self.method == "dorefa":
            return dorefa(x, bits)
        low, steps = (0.0, 2**bits - 1) if self.method == "pact" else (-alpha, 2 ** (bits - 1) - 1)
        step = alpha / steps
        return torch.round(x.clamp(low, alpha) / step) * step

    @staticmethod
    def w(layer: nn.Module, bits: int) -> Tensor:
        if bits == 32:
            return layer.weight
        t, steps = torch.tanh(layer.weight), 2 ** (bits - 1) - 1
        return torch.round(t / t.abs().max() * steps) / steps

    def conv(self, layer: nn.Conv2d, x: Tensor, bits: int) -> Tensor:
        return F.conv2d(x, self.w(layer, bits), None, layer.stride, layer.padding, 1, layer.groups)


def dorefa(x: Tensor, bits: int) -> Tensor:
    levels = 2**bits - 1
    return torch.round((0.1 * x).clamp(0, 1) * levels) / levels


def resnet20(net: nn.Module, x: Tensor, q: Reference, abit: list[int], wbit: list[int]) -> Tensor:
    """Every tensor of a block at the block's own width; stem and pool in float, the classifier at 16 bits."""
    x = net.bn1(net.conv1(x)).relu()
    blocks = [*net.layer1, *net.layer2, *net.layer3]
    for block, a, w in zip(blocks, abit, wbit, strict=True):
        y = q.a(block.bn1(q.conv(block.conv1, x, w)).relu(), a)
        y = block.bn2(q.conv(block.conv2, y, w))
        if not isinstance(block.shortcut, nn.Identity):
            x = q.a(block.shortcut[1](q.conv(block.shortcut[0], x, w)), a)
        x = q.a(y + x, a)
    return F.linear(x.mean((2, 3)), q.w(net.linear, 16), net.linear.bias)


def toynet(net: nn.Module, x: Tensor, q: Reference, abit: list[int], wbit: list[int]) -> Tensor:
    """Unit i takes inputs of abit[i] and gives abit[i + 1]; a strided block first normalises, then has a convolution and its width."""
    x = q.a(net.bn1(q.conv(net.conv1, x, wbit[0])), abit[1], 6.0)
    for i, block in enumerate(net.blocks, 1):
        if len(block.down):
            x = q.a(q.conv(block.down.conv, block.down.bn(x), wbit[i]), abit[i])
        y = q.a(block.bn(q.conv(block.depthwise, x, wbit[i])), abit[i])
        y = q.a(q.conv(block.expand, y, wbit[i]).relu(), abit[i])
        x = q.a(q.conv(block.project, y, wbit[i]) + x, abit[i + 1])
    x = q.a(net.bn2(q.conv(net.conv2, x, wbit[11])), abit[12], 6.0).mean((2, 3))
    return F.linear(q.a(x, abit[12], 6.0), q.w(net.linear, wbit[12]), net.linear.bias)


def mobilenetv2(net: nn.Module, x: Tensor, q: Reference, abit: list[int], wbit: list[int]) -> Tensor:
    """Unit i takes inputs of abit[i]; a block's end is quantized after its sum, its shortcut before; the pool always by DoReFa."""
    x = q.a(net.bn1(q.conv(net.conv1, x, wbit[0])).relu(), abit[1])
    for i, block in enumerate(net.blocks, 1):
        y = q.a(F.relu6(block.bn1(q.conv(block.conv1, x, wbit[i]))), abit[i])
        y = q.a(F.relu6(block.bn2(q.conv(block.conv2, y, wbit[i]))), abit[i])
        y = block.bn3(q.conv(block.conv3, y, wbit[i]))
        if block.residual:
            y = y + q.a(block.shortcut[1](q.conv(block.shortcut[0], x, wbit[i])), abit[i])
        x = q.a(y, abit[i + 1])
    x = net.bn2(q.conv(net.conv2, x, wbit[18])).relu().mean((2, 3))
    return F.linear(dorefa(x, abit[19]), q.w(net.linear, wbit[19]), net.linear.bias)


def both(compose, reference, method: str, *overrides: str) -> tuple[Tensor, Tensor]:
    """Returns the logits by the published formulas and by the recipe, of one random network."""
    cfg = compose(*overrides, *PUBLISHED[method])
    torch.manual_seed(0)
    net, x = instantiate(cfg.model.net).eval(), torch.randn(2, 3, 32, 32)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):  # shifts, so that both signs reach every quantizer
            module.running_mean.normal_(0, 0.3)
            module.bias.data.normal_(0, 0.5)
    structure = facts(net, x)
    with torch.no_grad():
        wanted = reference(net, x, Reference(method), list(cfg.layer_abit), list(cfg.layer_wbit))
        apply(net, resolve(net, structure, pipeline.recipe(read(cfg))), structure)
        calibrate(net, [x], followed_by_relu=structure.followed_by_relu, progress=False)
        return wanted, net(x)


@pytest.mark.parametrize("method", METHODS)
def test_resnet20(compose, method):
    wanted, got = both(
        compose,
        resnet20,
        method,
        *("model=resnet20b", "model.net.post_add_relu=false", f"quant=placed/resnet20/{method}"),
        "layer_abit=[8,7,6,5,4,3,4,5,6]",
        "layer_wbit=[6,5,4,3,4,5,6,7,8]",
    )
    assert torch.allclose(got, wanted, rtol=0, atol=1e-5 * float(wanted.abs().max()))


@pytest.mark.parametrize("method", METHODS)
def test_toynet(compose, method):
    six = [] if method == "dorefa" else [SIX]
    wanted, got = both(
        compose,
        toynet,
        method,
        *("model=toynet", f"quant=placed/toynet/{method}", *six),
        "layer_abit=[32,8,7,6,5,4,5,6,7,8,7,6,8]",
        "layer_wbit=[32,8,7,6,5,4,5,6,7,8,7,16,16]",
    )
    assert torch.allclose(got, wanted, rtol=0, atol=1e-5 * float(wanted.abs().max()))


@pytest.mark.parametrize("method", METHODS)
def test_mobilenetv2(compose, method):
    wanted, got = both(
        compose,
        mobilenetv2,
        method,
        *("model=mobilenetv2", f"quant=placed/mobilenetv2/{method}", "quant.rules.pool.output.unscale=false"),
        "layer_abit=[32,8,7,6,5,8,7,6,5,8,7,6,5,8,7,6,5,8,7,8]",
        "layer_wbit=[8,...]".replace("...", ",".join(["8"] * 19)),
    )
    assert torch.allclose(got, wanted, rtol=0, atol=1e-4 * float(wanted.abs().max()))


def test_a_width_of_a_mapping_reaches_the_sum_of_its_own_block(compose):
    cfg = compose("model=resnet20b", "quant=placed/resnet20/pact", "layer_abit={layer1.*: 4, layer2.*: 5, layer3.*: 6}")
    net = instantiate(cfg.model.net).eval()
    plan = resolve(net, facts(net, torch.zeros(1, 3, 32, 32)), pipeline.recipe(read(cfg)))
    bits = {e.layer: e.bits for e in plan if e.site == "output" and e.spec}
    assert [bits[f"layer{i}.2.add"] for i in (1, 2, 3)] == [4, 5, 6] and bits["layer2.0.shortcut.1"] == 5
