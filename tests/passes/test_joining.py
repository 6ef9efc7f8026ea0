"""Neighbouring units learned as one: capacities, which pairs, what a joined unit computes and how it is learned."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from qexp.errors import QexpError
from qexp.layers import quantizers
from qexp.layers.swap import quantizers_off, swap
from qexp.models.cifar_resnet import BasicBlock, CifarResNet
from qexp.network.facts import facts
from qexp.passes.base import PassContext
from qexp.passes.reconstruction.capture import inputs, targets
from qexp.passes.reconstruction.joining import capacity, joined_units, largest_steps
from qexp.passes.reconstruction.qdrop import QDrop
from qexp.passes.reconstruction.store import Store
from qexp.passes.reconstruction.units import Unit, find_units
from qexp.quantizers.learned_rounding import LearnedRounding
from qexp.statistics.stats import TensorStats


def quantized(net: nn.Module, bits: int = 4) -> nn.Module:
    for module in list(net.modules()):
        if isinstance(module, nn.Conv2d | nn.Linear):
            q = LearnedRounding(bits, tuple(module.weight.shape), signed=True)
            q.fit(TensorStats.of(module.weight.detach()))
            swap(module, {"weight": q})
    return net.eval()


class Chain(nn.Module):
    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        for i, layer in enumerate(layers):
            setattr(self, f"l{i}", layer)


def test_capacities_are_the_published_ones():
    even = quantized(Chain(nn.Conv2d(64, 64, 3, bias=False), nn.Conv2d(64, 64, 3, bias=False)))
    assert capacity(even, Unit("l0", ("l0", "l1"))) == 294912
    strided = quantized(
        Chain(
            nn.Conv2d(64, 128, 3, 2, bias=False),
            nn.Conv2d(128, 128, 3, bias=False),
            nn.Conv2d(64, 128, 1, 2, bias=False),
        )
    )
    assert capacity(strided, Unit("l0", ("l0", "l1", "l2"))) == pytest.approx(1114112)


def test_the_largest_steps_are_joined_where_they_can_be():
    assert largest_steps([2, 2.2, 5, 4.8, 4.9, 9], 2) == [1, 4]
    assert largest_steps([2, 2.2, 5, 4.8, 4.9, 9], 2, [True, False, True, True, True]) == [0, 4]
    assert largest_steps([1, 2], 5) == [0]


def network() -> tuple[CifarResNet, torch.Tensor, list[Unit]]:
    torch.manual_seed(0)
    net, x = quantized(CifarResNet(14), 3), torch.randn(4, 3, 32, 32)
    return net, x, find_units(net, facts(net, x), "blocks", x)


def test_blocks_of_a_residual_network_join_where_their_size_changes():
    net, x, units = network()
    joined = joined_units(net, units, 2, x)
    assert [u.modules for u in joined if u.before] == [("layer1.1", "layer2.0"), ("layer2.1", "layer3.0")]
    assert sorted(n for u in joined for n in u.layers) == sorted(n for u in units for n in u.layers), "each layer once"
    assert len(joined) == len(units) - 2
    three = joined_units(net, units, 3, x)
    assert [u.modules for u in three if u.before][1] == ("layer2.1", "layer3.0", "layer3.1"), (
        "pairs that overlap are one"
    )


def test_a_joined_unit_computes_what_its_modules_do_one_after_the_other():
    net, x, units = network()
    joined = next(u for u in joined_units(net, units, 1, x) if u.before)
    store = Store(64)
    with torch.no_grad():
        seen = inputs(net, joined, [x], store)[:]
        assert torch.equal(
            joined(net, seen), net.get_submodule(joined.modules[1])(net.get_submodule(joined.modules[0])(seen))
        )
        wanted = targets(net, joined, [x], store)[:]
        with quantizers_off(net):
            floating = inputs(net, joined, [x], store)[:]
            assert torch.allclose(joined(net, floating), wanted, atol=1e-5)


def test_units_that_do_not_meet_cannot_be_joined():
    class Apart(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = BasicBlock(4, 4, 1, "A"), BasicBlock(4, 4, 1, "A")

        def forward(self, x):
            return self.b(2 * self.a(x))

    net, x = quantized(Apart()), torch.randn(2, 4, 6, 6)
    units = find_units(net, facts(net, x), "blocks", x)
    with pytest.raises(QexpError, match="join finds no two units"):
        joined_units(net, units, 1, x)
    with pytest.raises(QexpError, match="join=-1 is not allowed"):
        QDrop(join=-1)


def test_joined_blocks_are_learned_kept_and_taken_again(tmp_path, caplog):
    def learned(k: int, folder=None) -> tuple[dict, nn.Module]:
        torch.manual_seed(0)
        net, x = quantized(CifarResNet(8), 3), torch.randn(8, 3, 32, 32)
        context = PassContext(facts(net, x), [x], {}, folder=folder, progress=False)
        QDrop(join=k, iterations=20, batch=4, step_lr=0, drop_prob=1.0).on_fitted(net, context)
        return context.findings, net

    def codes(net: nn.Module) -> dict[str, torch.Tensor]:
        return {n: q.codes(net.get_submodule(n).weight) for n, _, q in quantizers(net)}

    findings, net = learned(1, tmp_path)
    assert findings["reconstructed_units"] == 4 and findings["roundings_moved"] > 0
    assert learned(0)[0]["reconstructed_units"] == 5
    with caplog.at_level("INFO"):
        _, again = learned(1, tmp_path)
    assert caplog.text.count("learned earlier") == 4
    for name, found in codes(net).items():
        assert torch.equal(found, codes(again)[name]), name
