"""torchvision's networks, as they are and with random weights: covered whole, or refused by name."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torchvision import models

from qexp.calibration.calibrate import calibrate
from qexp.errors import QexpError
from qexp.layers import check_all_ran, quantizers, quantizers_off
from qexp.layers.quantized import WEIGHTED
from qexp.network.facts import facts
from qexp.recipe import Recipe, apply, resolve

UNIFORM = {"_target_": "qexp.quantizers.uniform.Uniform"}
SITES = {"input": UNIFORM | {"symmetric": False}, "weight": UNIFORM | {"signed": True, "granularity": "channel"}}


@pytest.mark.parametrize(
    ("name", "size"), [("resnet18", 32), ("mobilenet_v2", 32), ("squeezenet1_1", 64), ("swin_t", 32)]
)
def test_every_layer_is_covered(name, size):
    torch.manual_seed(0)
    model = models.get_model(name, weights=None).eval()
    keys = set(model.state_dict())
    x = torch.randn(2, 3, size, size)
    before = model(x)
    structure = facts(model, x)
    assert not structure.trace_error
    apply(model, resolve(model, structure, Recipe(SITES, wbit=8, abit=8)), structure)
    weighted = [n for n, m in model.named_modules() if isinstance(m, WEIGHTED)]
    carried = {(layer, site) for layer, site, _ in quantizers(model)}
    assert carried == {(n, s) for n in weighted for s in ("input", "weight")}
    calibrate(model, [x], progress=False)
    check_all_ran(model, x)
    assert {k for k in model.state_dict() if "_quantizer." not in k} == keys
    with quantizers_off(model):
        assert torch.equal(model(x), before)
    assert torch.isfinite(model(x)).all() and not torch.equal(model(x), before)


def refuse(model: nn.Module, x: torch.Tensor, message: str) -> None:
    structure = facts(model.eval(), x)
    with pytest.raises(QexpError, match=message):
        resolve(model, structure, Recipe(SITES, wbit=8, abit=8))


class Own(nn.Conv2d):
    """A convolution of a user's own class."""

    def forward(self, x):
        return super().forward(x) * 2


@pytest.mark.parametrize("layer", [Own(3, 4, 1), nn.ConvTranspose3d(3, 4, 1), nn.LSTM(3, 4), nn.Bilinear(3, 3, 4)])
def test_a_layer_of_an_unknown_type_is_refused_by_name(layer):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.odd = nn.Linear(3, 3), layer

        def forward(self, x):
            x = self.first(x)
            if isinstance(layer, Own):
                return self.odd(x[:, :, None, None])
            if isinstance(layer, nn.ConvTranspose3d):
                return self.odd(x[:, :, None, None, None])
            return self.odd(x, x) if isinstance(layer, nn.Bilinear) else self.odd(x)

    refuse(Net(), torch.randn(2, 3), rf"odd \({type(layer).__name__}\).*cannot carry quantizers")


def test_weights_read_behind_the_layers_back_are_refused_by_name():
    from tests.networks import Bypassed

    refuse(Bypassed(), torch.randn(2, 6), r"hidden \(Linear\): its weight is read without calling the layer")
