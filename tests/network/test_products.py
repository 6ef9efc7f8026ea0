"""Products outside the layers of known types: found for every way of computing the weight, counted and named."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

from qexp.errors import QexpError
from qexp.network.cost import quantized_macs
from qexp.network.facts import facts
from qexp.recipe import Recipe, resolve
from qexp.results.wording import width
from qexp.run.outcome import plan_line

UNIFORM = {"_target_": "qexp.quantizers.uniform.Uniform", "granularity": "tensor"}
SITES = {"input": UNIFORM, "weight": UNIFORM}
X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class Equalised(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight, self.gain = nn.Parameter(torch.randn(4, 4, 3, 3)), 0.2

    def forward(self, x):
        return F.conv2d(x, self.weight * self.gain, padding=1)


class Mixture(Equalised):
    """Kernels chosen by the image."""

    def forward(self, x):
        chosen = torch.einsum("n,oikl->noikl", x.mean((1, 2, 3)), self.weight)
        y = F.conv2d(x.reshape(1, -1, *x.shape[2:]), chosen.flatten(0, 1), padding=1, groups=len(x))
        return y.reshape(x.shape)


class Cosine(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8, 8))

    def forward(self, x):
        return F.normalize(x, dim=-1) @ F.normalize(self.weight).t()


class Blur(nn.Module):
    """A fixed filter."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("filter", torch.full((4, 1, 3, 3), 1 / 9))

    def forward(self, x):
        return F.conv2d(x, self.filter, padding=1, groups=4)


class Attention(nn.Module):
    """Products of activations alone."""

    def forward(self, x):
        y = x.flatten(2)
        return torch.bmm(torch.softmax(y @ y.transpose(1, 2), -1), y).reshape(x.shape)


class Net(nn.Module):
    def __init__(self, odd: nn.Module) -> None:
        super().__init__()
        self.first, self.odd, self.fc = nn.Conv2d(3, 4, 1), odd, nn.Linear(256, 5)

    def forward(self, x):
        return self.fc(torch.relu(self.odd(torch.relu(self.first(x)))).flatten(1))


@pytest.mark.parametrize(
    ("odd", "macs"),
    [
        (Equalised, 64 * 144),
        (Cosine, 256 * 8),
        (lambda: parametrizations.weight_norm(nn.Conv2d(4, 4, 3, padding=1)), 64 * 144),
        (lambda: parametrizations.spectral_norm(nn.Conv2d(4, 4, 3, padding=1)), 64 * 144),
        (Mixture, None),
    ],
)
def test_a_weight_that_was_changed_on_the_way_is_a_stray(odd, macs):
    model = Net(odd()).eval()
    found = facts(model, X)
    (stray,) = found.strays
    assert stray.startswith("odd") and (macs is None or found.products == {stray: macs})
    with pytest.raises(QexpError, match=r"odd.* compute with weights that cannot carry quantizers.*layers: 'odd"):
        resolve(model, found, Recipe(SITES, wbit=2, abit=2))


def test_a_rule_leaves_a_stray_in_float_and_the_plan_names_it():
    model = Net(Equalised()).eval()
    found = facts(model, X)
    plan = resolve(model, found, Recipe(SITES, wbit=2, abit=2, rules={"r": {"layers": "odd", "weight": None}}))
    share = 100 * (64 * 12 + 256 * 5) / (64 * 12 + 256 * 5 + 64 * 144)
    assert plan_line(plan, found, model).endswith("18 % of the products are quantized, in float stay odd (Equalised)")
    layers = plan.bits("weight")
    assert layers == {"first": 2, "fc": 2}
    row = {"layer_wbit": 2, "layer_abit": 2, "quantized_macs": share}
    assert width(row) == "W2A2 on 18 %" and width(row | {"quantized_macs": 100.0}) == "W2A2"


@pytest.mark.parametrize(
    ("odd", "products"),
    [
        (Blur, {"odd (conv2d)": 64 * 36}),
        (Attention, {"odd.matmul (matmul)": 4 * 4 * 64, "odd.bmm (matmul)": 4 * 4 * 64}),
        (lambda: nn.Conv2d(4, 4, 3, padding=1), {}),
        (lambda: nn.utils.weight_norm(nn.Conv2d(4, 4, 3, padding=1)), {}),
    ],
)
@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
def test_other_products_are_counted(odd, products):
    model = Net(odd()).eval()
    found = facts(model, X)
    assert found.strays == () and found.products == products
    share, left = quantized_macs({}, found.products, {}, {})
    assert set(left) == set(products) and share == 0
    plan = resolve(model, found, Recipe(SITES))
    assert ("in float stay odd" in plan_line(plan, found, model)) == bool(products)
