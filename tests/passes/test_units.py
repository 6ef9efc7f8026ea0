"""Which modules are reconstructed together, on the networks of conf/model and on awkward ones."""

from __future__ import annotations

import pytest
import torch
from hydra.utils import instantiate
from torch import nn

from qexp.errors import QexpError
from qexp.layers.swap import swap
from qexp.network.facts import facts
from qexp.passes.reconstruction.units import find_units
from qexp.quantizers.learned_rounding import LearnedRounding


def attached(net: nn.Module, images: torch.Tensor):
    """Returns the structure of a network, after a LearnedRounding was put on every convolution and linear layer."""
    structure = facts(net.eval(), images)
    for name in structure.order:
        layer = net.get_submodule(name)
        if isinstance(layer, nn.Conv2d | nn.Linear):
            q = LearnedRounding(4, tuple(layer.weight.shape), signed=True)
            q.mark_ready()
            swap(layer, {"weight": q})
    return structure


def units_of(net: nn.Module, images: torch.Tensor, wanted="blocks") -> dict[str, tuple[str, ...]]:
    structure = attached(net, images)
    return {u.name: u.layers for u in find_units(net, structure, wanted, images)}


@pytest.mark.parametrize(
    ("model", "blocks", "layers"),
    [
        ("resnet20", [f"layer{i}.{j}" for i in (1, 2, 3) for j in range(3)], ["conv1", "linear"]),
        ("mobilenetv2", [f"blocks.{i}" for i in range(17)], ["conv1", "conv2", "linear"]),
        ("resnet18", [f"layer{i}.{j}" for i in (1, 2, 3, 4) for j in range(2)], ["conv1", "fc"]),
        (
            "mobilenet_v2",
            [f"features.{i}" for i in range(1, 18)],
            ["features.0.0", "features.18.0", "classifier.1"],
        ),
        ("squeezenet1_1", [f"features.{i}" for i in (3, 4, 6, 7, 9, 10, 11, 12)], ["features.0", "classifier.1"]),
        ("digits_cnn", [], None),
    ],
)
def test_blocks_of_the_models(compose, model, blocks, layers):
    cfg = compose(f"model={model}")
    net = instantiate(cfg.model.net)
    size = cfg.model.get("input_size") or [1, 8, 8]
    side = 64 if size[-1] > 64 else size[-1]
    found = units_of(net, torch.randn(1, size[0], side, side))
    learned = [n for n, m in net.named_modules() if isinstance(getattr(m, "weight_quantizer", None), LearnedRounding)]
    assert [name for name in found if len(found[name]) > 1 or name in blocks] == blocks
    assert sorted(layer for inside in found.values() for layer in inside) == sorted(learned), "each layer once"
    if layers is not None:
        assert [name for name in found if name not in blocks] == layers


class Shared(nn.Module):
    """An add in the network itself, a layer that runs twice, and a block that keeps a number between calls."""

    def __init__(self) -> None:
        super().__init__()
        from qexp.models.modules import Add

        class Counting(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.conv, self.add, self.calls = nn.Conv2d(3, 3, 1), Add(), 0

            def forward(self, x: torch.Tensor) -> torch.Tensor:
                self.calls += 1
                return self.add(self.conv(x), x * self.calls)

        self.twice, self.block, self.add, self.fc = nn.Conv2d(3, 3, 1), Counting(), Add(), nn.Linear(3, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.add(self.twice(self.twice(x)), x)
        return self.fc(self.block(x).mean((2, 3)))


def test_what_cannot_be_isolated_is_taken_by_layers_and_said(caplog):
    caplog.set_level("INFO", logger="qexp")
    found = units_of(Shared(), torch.randn(2, 3, 4, 4))
    assert found == {"block.conv": ("block.conv",), "fc": ("fc",)}
    assert "block block cannot be isolated (what it returns depends on more than its input)" in caplog.text
    assert "layer twice keeps its nearest roundings (it runs 2 times)" in caplog.text
    assert "of the network itself" in caplog.text


def test_named_units_are_taken_and_bad_names_are_errors(residual):
    images = torch.randn(2, 3, 8, 8)
    structure = attached(residual, images)
    assert find_units(residual, structure, ["conv"], images)[-2].name == "conv"
    with pytest.raises(QexpError, match=r"no module 'con'.*conv"):
        find_units(residual, structure, ["con"], images)
    with pytest.raises(QexpError, match=r"add cannot be reconstructed: it holds no weight"):
        find_units(residual, structure, ["add"], images)
    with pytest.raises(QexpError, match=r"units='stages'; allowed are layers, blocks"):
        find_units(residual, structure, "stages", images)
    net = Shared()
    structure = attached(net, torch.randn(2, 3, 4, 4))
    with pytest.raises(QexpError, match=r"block cannot be reconstructed: what it returns depends on more"):
        find_units(net, structure, ["block"], torch.randn(2, 3, 4, 4))
    with pytest.raises(QexpError, match=r"block.conv lies inside block"):
        find_units(net, structure, ["block", "block.conv"], torch.randn(2, 3, 4, 4))


def test_a_network_without_learned_roundings_is_an_error(residual):
    with pytest.raises(QexpError, match="no weight with a LearnedRounding quantizer"):
        find_units(residual, facts(residual, torch.randn(1, 3, 8, 8)), "layers", torch.randn(1, 3, 8, 8))
