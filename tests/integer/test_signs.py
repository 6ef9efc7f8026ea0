"""One-bit networks become integers: signs at learned thresholds, activations with learned slopes and shifts per channel."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from omegaconf import OmegaConf
from torch import Tensor, nn

from qexp.integer import package
from qexp.models.bireal_resnet import BiRealResNet
from tests.integer.conftest import CHANNELS, UNIFORM
from tests.integer.test_kinds import IMAGES, Net, proven

DEPLOY = OmegaConf.to_container(OmegaConf.load(Path(__file__).parents[2] / "conf/deploy/integer.yaml").quant.rules)
RSIGN = {"_target_": "qexp.quantizers.rsign.RSign", "granularity": "channel"}
SIGN = {"_target_": "qexp.quantizers.sign.Sign"}
MAGNITUDE = {"_target_": "qexp.quantizers.bwn.BWN", "granularity": "channel"}
ENDS = {"layers": ["conv1", "linear"], "input": UNIFORM | {"bits": 8}, "weight": CHANNELS | {"bits": 8}}


@pytest.mark.parametrize(
    ("activation", "down", "input"),
    [("rprelu", "avg_zero", RSIGN), ("maxout", "strided_zero", RSIGN), ("prelu", "avg_conv", SIGN)],
)
def test_a_one_bit_network_is_proven_equal(activation, down, input, quantize, tmp_path):
    torch.manual_seed(0)
    network = BiRealResNet(8, activation=activation, shortcut_down=down)
    for layer in (m for m in network.modules() if type(m).__name__ in ("RPReLU", "Maxout", "PReLU")):
        for parameter in layer.parameters():
            nn.init.uniform_(parameter, -0.2, 0.6)
    network(torch.randn(16, 3, 16, 16))  # statistics of the batch norms
    rules = {"ends": ENDS, "shortcuts": {"layers": "*.shortcut.*", "optional": True, "input": UNIFORM | {"bits": 8}}}
    model, images = quantize(network, 1, 1, rules=rules | DEPLOY, shape=(16, 3, 16, 16), input=input, weight=MAGNITUDE)
    thresholds = [p for name, p in model.named_parameters() if name.endswith("theta")]
    assert bool(thresholds) == (input is RSIGN)
    for threshold in thresholds:
        nn.init.uniform_(threshold, -0.2, 0.2)
    program = proven(model, images, share=100.0).program  # beside a threshold, a real scale decides otherwise
    if shutil.which("cc"):
        package.write(program, tmp_path / "package", images[:1].numpy())
        assert "0 of 10 scores differ" in package.compile_and_run(tmp_path / "package")


class Slopes(nn.Module):
    """Functions with parameters of the module that calls them."""

    def __init__(self) -> None:
        super().__init__()
        self.shift, self.slope = nn.Parameter(torch.linspace(-1, 1, 8)), nn.Parameter(torch.linspace(-0.2, 0.7, 8))

    def forward(self, x: Tensor) -> Tensor:
        bent = F.prelu(x - self.shift[:, None, None], self.slope)
        return F.elu(bent + self.shift[:, None, None]) + F.softplus(F.mish(x))


def test_functions_with_a_slope_per_channel_are_tables(quantize):
    proven(*quantize(Net(Slopes()), rules=DEPLOY, shape=IMAGES), share=5.0)
