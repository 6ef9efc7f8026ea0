"""Integer programs of networks that call functions where others hold modules."""

from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from torch import nn
from torch.nn import functional as F

from qexp.integer import torch_file
from qexp.integer.lowering import lower
from qexp.integer.verify import verify
from qexp.layers.calls import Routed
from qexp.models.modules import Add, Concat
from tests.integer.conftest import FIXED, UNIFORM

CONF = Path(__file__).parents[2] / "conf/deploy"
SYMMETRIC = {"symmetric": True}  # a concatenation takes codes without a zero point


def rules(how: str) -> dict:
    """Returns the rules of `deploy=HOW` with symmetric codes."""
    found = OmegaConf.to_container(OmegaConf.load(CONF / f"{how}.yaml").quant.rules)
    return {
        name: rule | {"input": rule["input"] | SYMMETRIC} if "symmetric" in rule.get("input", {}) else rule
        for name, rule in found.items()
    }


RULES = {how: rules(how) for how in ("integer", "int8")}


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn, self.conv2 = nn.Conv2d(6, 6, 3, padding=1), nn.BatchNorm2d(6), nn.Conv2d(6, 6, 1)

    def forward(self, x):
        y = self.conv2(F.relu(self.bn(self.conv1(x))))
        y += x
        return F.relu(y)


class Functions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.block, self.fc = nn.Conv2d(3, 6, 3), Block(), nn.Linear(12, 5)

    def forward(self, x):
        x = F.max_pool2d(self.stem(x), 2).relu_()
        x = torch.cat((self.block(x), x), 1)
        return self.fc(torch.flatten(F.adaptive_avg_pool2d(x, 1), 1))


class BlockOfModules(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn, self.conv2 = nn.Conv2d(6, 6, 3, padding=1), nn.BatchNorm2d(6), nn.Conv2d(6, 6, 1)
        self.relu, self.add, self.relu_1 = nn.ReLU(), Add(), nn.ReLU()

    def forward(self, x):
        return self.relu_1(self.add(self.conv2(self.relu(self.bn(self.conv1(x)))), x))


class Modules(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.block, self.fc = nn.Conv2d(3, 6, 3), BlockOfModules(), nn.Linear(12, 5)
        self.max_pool2d, self.relu, self.cat = nn.MaxPool2d(2), nn.ReLU(), Concat()
        self.adaptive_avg_pool2d = nn.AdaptiveAvgPool2d(1)

    def forward(self, x):
        x = self.relu(self.max_pool2d(self.stem(x)))
        x = self.cat(self.block(x), x)
        return self.fc(torch.flatten(self.adaptive_avg_pool2d(x), 1))


@pytest.mark.parametrize("how", RULES)
def test_functions_lower_as_modules_do(how, quantize):
    programs = []
    for make in (Functions, Modules):
        torch.manual_seed(0)
        model, images = quantize(make(), rules=RULES[how], shape=(24, 3, 10, 10), input=UNIFORM | SYMMETRIC)
        lowered = lower(model, images[:1], as_runtimes=how == "int8")
        verdict = verify(model, lowered, [(images, None)], progress=False)
        assert verdict.equal and ("block.add", "input.1") in lowered.sites, verdict.line()
        programs.append(lowered.program)
    one, other = programs
    assert [(op.kind, op.layer) for op in one.ops] == [(op.kind, op.layer) for op in other.ops]
    assert one.tensors.keys() == other.tensors.keys()


def test_an_archive_computes_what_the_network_does(quantize, tmp_path):
    torch.manual_seed(0)
    model, images = quantize(Functions(), rules=RULES["int8"], shape=(24, 3, 10, 10))
    torch_file.write(model, tmp_path / "archive", images)
    network, given, scores = torch_file.read(tmp_path / "archive")
    with torch.no_grad():
        assert torch.equal(network(given), scores) and torch.equal(scores, model(images))


def test_calls_without_quantizers_lower_too(quantize):
    """Sums that are float in the simulation are rounded by the program, and so in its comparison; the network keeps its classes."""
    torch.manual_seed(0)
    model, images = quantize(Functions(), input=FIXED, rules={}, shape=(24, 3, 10, 10))
    assert not any(isinstance(m, Routed) for m in model.modules())
    lowered = lower(model, images[:1])
    assert any(layer == "block.add" for layer, _ in lowered.sites)
    assert verify(model, lowered, [(images, None)], progress=False).equal
    assert not any(isinstance(m, Routed) for m in model.modules())
