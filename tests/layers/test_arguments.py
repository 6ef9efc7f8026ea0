"""A layer's arguments besides its input, and its results besides the first."""

import pytest
import torch
from torch import Tensor, nn

from qexp.analysis.error_by_depth import errors_by_depth
from qexp.calibration.calibrate import calibrate
from qexp.layers.swap import quantizers_off
from qexp.network.facts import facts
from qexp.recipe import Recipe, apply, resolve

UNIFORM = {"_target_": "qexp.quantizers.uniform.Uniform", "symmetric": False, "bits": 8}
WEIGHT = {"_target_": "qexp.quantizers.uniform.Uniform", "granularity": "channel", "bits": 8}


class Unpooling(nn.Module):
    """A max pool that returns its indices, and the unpool that uses them."""

    def __init__(self, kind: type = nn.MaxPool2d) -> None:
        super().__init__()
        self.conv1, self.conv2, self.fc = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1), nn.Linear(4, 5)
        self.pool, self.unpool = kind(2, 2, return_indices=True), nn.MaxUnpool2d(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        x, where = self.pool(self.conv1(x))
        return self.fc(self.conv2(self.unpool(x, where)).mean((2, 3)))


class Sized(nn.Module):
    """A transposed convolution that takes the size of its result, by name or by position."""

    def __init__(self, named: bool) -> None:
        super().__init__()
        self.down, self.up = nn.Conv2d(3, 4, 3, stride=2, padding=1), nn.ConvTranspose2d(4, 4, 3, stride=2, padding=1)
        self.fc, self.named = nn.Linear(4, 5), named

    def forward(self, x: Tensor) -> Tensor:
        size = list(x.shape[2:])
        y = self.down(x)
        y = self.up(y, output_size=size) if self.named else self.up(y, size)
        if y.shape[2:] != x.shape[2:]:
            raise ValueError("the size was not taken")
        return self.fc(y.mean((2, 3)))


class Keywords(nn.Module):
    """Every layer is called by the name of its argument."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.relu = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()
        self.pool, self.fc = nn.AdaptiveAvgPool2d(1), nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(input=self.norm(input=self.conv(input=x)))
        return self.fc(input=self.pool(input=x).flatten(1))


CASES = [(Unpooling(), "pool"), (Sized(True), "up"), (Sized(False), "up"), (Keywords(), "relu")]


@pytest.mark.parametrize(("model", "layer"), CASES, ids=["indices", "size by name", "size by place", "keywords"])
def test_a_quantized_layer_passes_on_what_it_is_given_and_returns(model, layer):
    torch.manual_seed(0)
    x = torch.randn(4, 3, 8, 8)
    structure = facts(model.eval(), x[:1])
    assert {"input", "output"} <= set(structure.shapes[layer])
    rules = {"here": {"layers": layer, "input": UNIFORM, "output": UNIFORM}}
    plan = resolve(model, structure, Recipe(sites={"input": UNIFORM, "weight": WEIGHT}, rules=rules, wbit=8, abit=8))
    apply(model, plan, structure)
    seen = calibrate(model, [x], progress=False)
    assert not seen[layer, "output"].channel.empty
    with torch.no_grad():
        with quantizers_off(model):
            wanted = model(x)
        got = model(x)
    assert 0 < (got - wanted).norm() / wanted.norm() < 0.05
    assert all(row["total"] > 5 for row in errors_by_depth(model, x)[0])  # another index moves a whole value
    pool = model.get_submodule(layer)
    assert pool.output_quantizer.scale.numel() == 1 and pool.input_quantizer.ready
