"""A quantized layer takes what its float layer takes, however it is passed."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from qexp.calibration.calibrate import calibrate
from qexp.layers import bake, quantizers_off, swap
from qexp.layers.quantized import QUANTIZED
from qexp.models.activations import Maxout, RPReLU
from qexp.models.modules import Add, Concat
from qexp.models.operations import Divide, Elementwise, Length, MatMul, Mean, Multiply, Subtract, Sum
from qexp.network.facts import facts
from qexp.network.lean_evaluation import lean
from qexp.quantizers.uniform import Uniform
from qexp.recipe import Recipe, apply, resolve

UNIFORM = {"_target_": "qexp.quantizers.uniform.Uniform"}
SITES = {"input": UNIFORM | {"symmetric": False}, "weight": UNIFORM | {"granularity": "channel"}}


class UpDown(nn.Module):
    """An encoder and a decoder that takes its output size."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.down, self.norm = nn.Conv2d(3, 6, 3, stride=2, padding=1), nn.BatchNorm2d(6)
        self.act, self.add = nn.ReLU(), Add()
        self.up = nn.ConvTranspose2d(6, 6, 3, stride=2, padding=1, output_padding=int(how == "fixed"))
        self.pool, self.fc = nn.AdaptiveAvgPool2d(2), nn.Linear(24, 4)

    def forward(self, x):
        y = self.act(input=self.norm(input=self.down(input=x)))
        size = x.size()[2:]
        if self.how == "fixed":
            up = self.up(y)
        elif self.how == "positional":
            up = self.up(y, list(size))
        elif self.how == "keyword":
            up = self.up(y, output_size=x.size())
        else:
            up = self.up(output_size=size, input=y)
        up = self.add(a=up, b=self.act(input=up))
        return self.fc(input=torch.flatten(input=self.pool(input=up), start_dim=1))


@torch.no_grad()
def test_an_output_size_passed_in_any_way_gives_the_same_network():
    x, scores = torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(0)), {}
    for how in ("fixed", "positional", "keyword", "all keywords"):
        torch.manual_seed(0)
        model = UpDown(how).eval()
        exact, found = model(x), facts(model, x[:1])
        assert found.trace_error == "" and found.shapes["up"]["input"] == (2, 6, 4, 4)
        assert found.sources["add"] == (("up",), ("act", "up")) and found.bn_of == {"down": "norm"}
        rules = {"sums": {"types": ["Add", "ReLU", "AdaptiveAvgPool2d", "BatchNorm2d"], "input": SITES["input"]}}
        apply(model, resolve(model, found, Recipe(SITES, rules=rules)), found)
        calibrate(model, [x], progress=False)
        with quantizers_off(model):
            assert torch.equal(model(x), exact)
        scores[how] = model(x)
        assert (scores[how] - exact).abs().max() < 0.05 * exact.abs().max()
        with lean(model, x):
            assert torch.equal(model(x), scores[how])
        bake(model.up)
        model(x)
    assert all(torch.equal(score, scores["fixed"]) for score in scores.values())


MAKE = {
    nn.Conv1d: (lambda: nn.Conv1d(3, 4, 1), (2, 3, 8)),
    nn.Conv3d: (lambda: nn.Conv3d(3, 4, 1), (2, 3, 4, 4, 4)),
    nn.Linear: (lambda: nn.Linear(8, 4), (2, 3, 8)),
    nn.Conv2d: (lambda: nn.Conv2d(3, 4, 1), (2, 3, 8, 8)),
    nn.ConvTranspose2d: (lambda: nn.ConvTranspose2d(3, 4, 2), (2, 3, 8, 8)),
    nn.BatchNorm1d: (lambda: nn.BatchNorm1d(3), (2, 3, 8)),
    nn.BatchNorm2d: (lambda: nn.BatchNorm2d(3), (2, 3, 8, 8)),
    nn.AvgPool2d: (lambda: nn.AvgPool2d(2), (2, 3, 8, 8)),
    nn.AdaptiveAvgPool2d: (lambda: nn.AdaptiveAvgPool2d(2), (2, 3, 8, 8)),
    nn.MaxPool2d: (lambda: nn.MaxPool2d(2), (2, 3, 8, 8)),
    nn.Upsample: (lambda: nn.Upsample(scale_factor=2), (2, 3, 8, 8)),
    nn.Softmax: (lambda: nn.Softmax(1), (2, 3, 8, 8)),
    nn.LayerNorm: (lambda: nn.LayerNorm(8), (2, 3, 8, 8)),
    nn.GroupNorm: (lambda: nn.GroupNorm(3, 3), (2, 3, 8, 8)),
    nn.InstanceNorm2d: (lambda: nn.InstanceNorm2d(3), (2, 3, 8, 8)),
    nn.Hardshrink: (lambda: nn.Hardshrink(0.02), (2, 3, 8, 8)),
    nn.Threshold: (lambda: nn.Threshold(0, 0), (2, 3, 8, 8)),
    RPReLU: (lambda: RPReLU(3), (2, 3, 8, 8)),
    Maxout: (lambda: Maxout(3), (2, 3, 8, 8)),
    Elementwise: (lambda: Elementwise("erf"), (2, 3, 8, 8)),
    Mean: (lambda: Mean((2, 3)), (2, 3, 8, 8)),
    Sum: (lambda: Sum((2, 3)), (2, 3, 2, 2)),
    Length: (lambda: Length((1,)), (2, 3, 8, 8)),
}


@pytest.mark.parametrize(
    "kind",
    [k for k in QUANTIZED if not issubclass(k, Add | Concat | Subtract | Multiply | Divide | MatMul)],
    ids=lambda k: k.__name__,
)
@torch.no_grad()
def test_every_layer_can_be_called_by_keyword(kind):
    make, shape = MAKE.get(kind, (kind, (2, 3, 8, 8)))
    layer, x, seen = make().eval(), torch.randn(shape), []
    exact = layer(input=x)
    swap(layer, {"input": Uniform(8, symmetric=False)})
    layer.register_forward_pre_hook(lambda module, args: seen.append(args[0].shape))
    calibrate(nn.Sequential(layer), [x], progress=False)
    assert torch.equal(layer(input=x), layer(x)) and len(seen) == 3 and set(seen) == {x.shape}
    assert (layer(x) - exact).abs().max() < 0.05
    with quantizers_off(layer):
        assert torch.equal(layer(input=x), exact)
