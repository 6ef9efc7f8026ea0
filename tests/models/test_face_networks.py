"""The face networks have the published sizes."""

import pytest
import torch

from qexp.errors import QexpError
from qexp.models.mobilefacenet import MobileFaceNet
from qexp.models.squeezenet_face import SqueezeNetFace
from qexp.network.cost import layer_costs, params
from qexp.network.facts import facts


def test_the_squeezenet_has_the_published_counts():
    model = SqueezeNetFace().eval()
    found = facts(model, torch.zeros(1, 3, 160, 160))
    assert params(model) == 1_366_696
    assert sum(c.macs for c in layer_costs(model, found).values()) == 170_821_312
    assert not found.trace_error and len(found.bn_of) == 25
    assert model(torch.zeros(2, 3, 160, 160)).shape == (2, 128)


def test_no_relu_follows_the_last_convolution_of_the_squeezenet():
    torch.manual_seed(0)
    model = SqueezeNetFace(features=4).eval()
    x = torch.randn(2, 3, 64, 64)
    maps = model.conv10(model.features(x))
    assert (maps.mean((2, 3)) < 0).any(), "the means carry both signs"
    assert torch.equal(model(x), model.bn(model.embedding(model.pool(maps).flatten(1))))
    assert "conv10" not in facts(model, x).followed_by_relu


def test_the_mobilefacenet_is_traced_whole():
    model = MobileFaceNet().eval()
    found = facts(model, torch.zeros(1, 3, 112, 96))
    assert params(model) == 999_552 and not found.trace_error and len(found.bn_of) == 50
    assert model(torch.zeros(2, 3, 112, 96)).shape == (2, 128)


def test_other_inputs_fit_or_are_refused():
    assert MobileFaceNet(size=(112, 112)).eval()(torch.zeros(1, 3, 112, 112)).shape == (1, 128)
    with pytest.raises(QexpError, match=r"size=\[100, 96\]; multiples of 16"):
        MobileFaceNet(size=(100, 96))
