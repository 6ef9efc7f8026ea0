"""What holds inside a block alone is gone after it: hooks, evaluation mode, weights that are held."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from qexp.layers.quantized import BAKED
from qexp.layers.swap import baked_weights, swap
from qexp.network.facts import facts
from qexp.passes.base import PassContext
from qexp.passes.integer_layers import IntegerLayers
from qexp.passes.rate import Rate
from qexp.passes.refine_exponents import RefineExponents
from qexp.system.within import evaluating, hooked
from qexp.tasks.base import evaluated
from qexp.tasks.distillation import Distillation


def hooks_on(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 5))


def test_hooks_go_when_the_block_ends_and_when_it_raises():
    net, seen = network(), []
    with hooked(m.register_forward_hook(lambda *_: seen.append(1)) for m in net):
        assert hooks_on(net) == 5
        net(torch.rand(2, 3, 8, 8))
    assert len(seen) == 5 and not hooks_on(net)
    with pytest.raises(RuntimeError), hooked([net[0].register_forward_pre_hook(lambda *_: None)]):
        net(torch.rand(2, 4, 8, 8))
    assert not hooks_on(net)


def test_hooks_go_when_one_of_them_cannot_be_put_on():
    net = network()
    modules = [net[0], net[1], object()]
    with pytest.raises(AttributeError), hooked(m.register_forward_hook(lambda *_: None) for m in modules):
        pass
    assert not hooks_on(net)


def frozen() -> nn.Sequential:
    """A network in training whose norm is frozen."""
    net = network().train()
    net[1].eval()
    return net


IMAGES = torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    "run",
    [
        lambda net: IntegerLayers().on_fitted(net, PassContext(facts(net, IMAGES[:1]), [IMAGES], {})),
        lambda net: RefineExponents().on_fitted(net, PassContext(facts(net, IMAGES[:1]), [IMAGES], {})),
        lambda net: Rate().on_fitted(net, PassContext(facts(net, IMAGES[:1]), [IMAGES], {})),
        lambda net: Distillation(network()).check(net, IMAGES[:1], 5),
        lambda net: evaluated(net, IMAGES),
    ],
    ids=["integer layers", "refine exponents", "rate", "distillation", "evaluated"],
)
def test_a_frozen_norm_stays_frozen_in_a_network_that_trains(run):
    net = frozen()
    before = net[1].num_batches_tracked.clone()
    run(net)
    assert [m.training for m in net] == [True, False, True, True, True] and net.training
    assert torch.equal(before, net[1].num_batches_tracked), "what was measured was the network in evaluation"


def test_modes_come_back_when_the_block_raises():
    net = frozen()
    with pytest.raises(ZeroDivisionError), evaluating(net):
        assert not any(m.training for m in net.modules())
        raise ZeroDivisionError
    assert [m.training for m in net] == [True, False, True, True, True]


def test_a_held_weight_leaves_no_trace():
    net = network()
    state = set(net.state_dict())
    swap(net[0], {"weight": nn.Hardtanh(-0.1, 0.1)})
    names, exact = set(net.state_dict()), net(IMAGES)
    with baked_weights(net):
        assert BAKED in dict(net[0].named_buffers()) and set(net.state_dict()) == names
        assert torch.equal(net(IMAGES), exact)
    assert not dict(net[0].named_buffers()) and state <= names
    net[0].register_buffer(BAKED, torch.ones(1))  # of the same name: nothing of the held one is remembered
    assert f"0.{BAKED}" in net.state_dict()
