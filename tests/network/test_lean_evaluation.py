"""Evaluation in fewer passes gives the same numbers, and leaves alone what others read."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from qexp.calibration.calibrate import calibrate
from qexp.layers import baked_weights, swap
from qexp.layers.xnor import XNOR
from qexp.models.cifar_resnet import CifarResNet
from qexp.models.modules import Add
from qexp.network.facts import facts
from qexp.network.lean_evaluation import Spared, clips, find_spared, lean
from qexp.passes.fold_bn import fold_bn
from qexp.quantizers.lsq import LSQ
from qexp.quantizers.pact import PACT
from qexp.quantizers.sign import Sign
from qexp.quantizers.uniform import Uniform
from qexp.ranges import Fixed
from qexp.statistics.stats import TensorStats
from tests.networks import Mixed, Residual

X = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def quantized(model: nn.Module, kinds: tuple[type, ...], make=lambda: LSQ(4), x: torch.Tensor = X) -> nn.Module:
    """Puts a quantizer on the inputs of all layers of some kinds, and calibrates."""
    model.eval()
    for layer in [m for m in model.modules() if type(m) in kinds]:
        sites = ("input.0", "input.1") if isinstance(layer, Add) else ("input",)
        swap(layer, {site: make() for site in sites})
    calibrate(model, [x], progress=False)
    return model


@torch.no_grad()
def check_same(model: nn.Module, x: torch.Tensor = X):
    """Asserts the same outputs, bit for bit, an untouched input and an untouched model; returns what was spared."""
    before, state, kept = model(x), copy.deepcopy(model.state_dict()), x.clone()
    with lean(model, x) as spared:
        after = model(x)
    assert torch.equal(before, after) and torch.equal(x, kept) and torch.equal(before, model(x))
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert not any("forward" in m.__dict__ or getattr(m, "inplace", False) for m in model.modules())
    return spared


@pytest.mark.parametrize("make", [lambda: LSQ(4), lambda: PACT(3), lambda: Uniform(4, symmetric=False)])
def test_a_residual_network_computes_the_same_in_fewer_passes(make):
    torch.manual_seed(0)
    model = CifarResNet(depth=8).eval()
    images = torch.randn(4, 3, 32, 32)
    fold_bn(model, facts(model, images))
    model = quantized(model, (nn.Conv2d, nn.Linear), make, images)
    with baked_weights(model):
        spared = check_same(model, images)
    blocks = [f"layer{n}.0" for n in (1, 2, 3)]
    assert spared.absorbed == tuple(f"{block}.relu1" for block in blocks)  # the others also feed a float shortcut
    assert set(spared.in_place) == {"relu1"} | {f"{b}.{m}" for b in blocks for m in ("add", "relu2")}


def test_a_relu_before_a_float_operand_stays_until_the_operand_is_quantized():
    kinds = (nn.Conv2d, nn.Linear)
    assert check_same(quantized(Residual(), kinds)).absorbed == ("relu2", "relu3")
    assert check_same(quantized(Residual(), (*kinds, Add))).absorbed == ("relu1", "relu2", "relu3")


def test_a_float_network_only_writes_in_place():
    spared = check_same(Residual().eval())
    assert spared.absorbed == () and set(spared.in_place) == {"relu1", "relu2", "add", "relu3"}


def test_a_module_that_runs_twice_is_spared_only_where_every_call_allows_it():
    model = quantized(Mixed(), (nn.Conv2d,))
    assert "act" not in (spared := check_same(model)).absorbed  # its second result goes into activations
    assert "act" not in spared.in_place  # and there it reads a product, which is no layer's result


class Through(nn.Module):
    """A ReLU with a pooling between it and the layer, on the network's own input."""

    def __init__(self, act: type[nn.Module] = nn.ReLU) -> None:
        super().__init__()
        self.act, self.pool, self.drop, self.fc = act(), nn.MaxPool2d(2, padding=1), nn.Dropout(), nn.Linear(75, 4)

    def forward(self, x):
        return self.fc(torch.flatten(self.drop(self.pool(self.act(x))), 1))


def test_what_commutes_with_a_relu_is_looked_through_and_the_input_is_not_written_to():
    assert check_same(quantized(Through(), (nn.Linear,))).absorbed == ("act",)
    assert check_same(Through().eval()) == type(find_spared(Through(), X))()


@pytest.mark.parametrize(("high", "absorbed"), [(5.0, ("act",)), (6.0, ("act",)), (9.0, ())])
def test_relu6_needs_a_clip_at_six_too(high, absorbed):
    model = quantized(Through(nn.ReLU6), (nn.Linear,), lambda: Uniform(4, range=Fixed(0, high)), 4 * X)
    assert check_same(model, 4 * X).absorbed == absorbed


def test_quantizers_that_tell_negatives_apart_keep_their_relu():
    wide = Uniform(4, symmetric=False)
    wide.fit(TensorStats.of(torch.linspace(-1, 2, 50)))
    signed = LSQ(4, signed=True)
    signed.fit(TensorStats.of(X))
    assert not clips(wide, torch.relu) and not clips(signed, torch.relu)
    noisy = Uniform(4, signed=False, rounding="stochastic")
    noisy.fit(TensorStats.of(X.abs()))
    assert not clips(noisy, torch.relu) and not clips(Uniform(4, signed=False), torch.relu)


def test_layers_that_read_more_than_quantized_values_keep_their_relu():
    model = Residual().eval()
    swap(model.depthwise, {"input": Sign()}, {"_target_": XNOR})
    calibrate(model, [X], progress=False)
    assert "relu1" not in check_same(model).absorbed


def test_hooks_see_what_they_always_saw():
    model = quantized(Residual(), (nn.Conv2d, nn.Linear))
    model.grouped.register_forward_pre_hook(lambda *_: None)
    model.grouped.register_forward_hook(lambda *_: None)
    assert "relu2" not in check_same(model).absorbed


def test_a_relu_of_its_own_quantizer_needs_no_graph_behind_it():
    model = Residual().eval()
    swap(model.relu1, {"output": LSQ(4)})
    calibrate(model, [X], progress=False)
    assert check_same(model).absorbed == ("relu1",)


class PreActivation(nn.Module):
    """A block whose shortcut reads the tensor that the first activation is given."""

    def __init__(self, act: type[nn.Module], inplace: bool) -> None:
        super().__init__()
        self.stem, self.act, self.pool = nn.Conv2d(3, 4, 3, padding=1), act(inplace=inplace), nn.MaxPool2d(3, 1, 1)
        self.conv, self.add, self.fc = nn.Conv2d(4, 4, 3, padding=1), Add(), nn.Linear(256, 3)

    def forward(self, x):
        x = self.stem(x)
        return self.fc(self.add(self.conv(self.pool(self.act(x))), x).flatten(1))


class Beside(PreActivation):
    """Two branches that are concatenated; one reads the tensor that the activation of the other is given."""

    def forward(self, x):
        x = self.stem(x)
        left = self.conv(self.act(x))
        return self.fc(torch.cat([left[:, :2], x[:, 2:]], 1).flatten(1))


@pytest.mark.parametrize("site", [None, "input", "output"])
@pytest.mark.parametrize("act", [nn.ReLU, nn.ReLU6])
@pytest.mark.parametrize("net", [PreActivation, Beside])
def test_an_activation_in_place_whose_operand_others_read(net, act, site, caplog):
    """The float network's shortcut carries the rectified tensor; so must the quantized one's, in all passes and in fewer."""
    torch.manual_seed(0)
    model = net(act, inplace=True).eval()
    with torch.no_grad():
        exact = model(X)
    for layer in (model.conv, model.fc):
        swap(layer, {"input": Uniform(8, symmetric=False)})
    if site is not None:
        swap(model.act, {site: Uniform(8, symmetric=False)})
    calibrate(model, [X], progress=False)
    with torch.no_grad():
        plain = model(X)
        assert (plain - exact).abs().max() < 0.05 * exact.abs().max()
        with lean(model, X) as spared:
            assert torch.equal(model(X), plain) and torch.equal(model(X), plain)
    assert ("act" in spared.absorbed) == (site == "output") and "gives different results" not in caplog.text
    loss = model.train()(X).square().sum()
    loss.backward()
    assert all(torch.isfinite(p.grad).all() for p in (model.stem.weight, model.conv.weight))


def test_the_first_batch_shows_a_wrong_rewrite(monkeypatch, caplog):
    model = quantized(PreActivation(nn.ReLU, inplace=False), (nn.Conv2d,))
    with torch.no_grad():
        plain = model(X)
        model.act.inplace = True
        right = model(X)
        assert not torch.equal(plain, right)
        monkeypatch.setattr("qexp.network.lean_evaluation.find_spared", lambda *_: Spared(absorbed=("act",)))
        with lean(model, X):
            assert torch.equal(model(X), right) and torch.equal(model(X[:2]), model(X)[:2])
    assert "gives different results at act; all passes are computed instead" in caplog.text


class Untraceable(Residual):
    """Which calls are made depends on the images."""

    def forward(self, x):
        return super().forward(x) if x.sum() > 0 else super().forward(-x)


def test_a_network_that_cannot_be_traced_is_left_alone():
    assert check_same(quantized(Untraceable(), (nn.Conv2d,))) == type(find_spared(Untraceable(), X))()


@settings(deadline=None, max_examples=30)
@given(
    bits=st.integers(1, 8),
    symmetric=st.booleans(),
    low=st.sampled_from([0.0, -1e-3, -1.0]),
    values=st.lists(st.floats(-(2.0**60), 2.0**60, width=32), min_size=1, max_size=20),
)
def test_what_clips_does_so_for_every_number(bits, symmetric, low, values):
    quantizer = Uniform(bits, signed=False if low == 0 else "auto", symmetric=symmetric or bits == 1)
    if quantizer.symmetric and low < 0 and bits == 1:
        return
    quantizer.fit(TensorStats.of(torch.tensor([low, 0.5, 3.0])))
    x = torch.tensor(values)
    same = torch.equal(quantizer(x), quantizer(torch.relu(x)))
    assert same or not clips(quantizer, torch.relu)


def test_nothing_stays_behind():
    """What a module is set to enters the hash of kept statistics: a run that has evaluated must calibrate under the same one."""
    from qexp.calibration.cache import behaviour
    from qexp.models.digits_cnn import DigitsCNN

    model = DigitsCNN().eval()
    before = [behaviour(m) for m in model.modules()]
    with lean(model, torch.ones(2, 1, 8, 8)), torch.no_grad():
        model(torch.zeros(1, 1, 8, 8))
    assert [behaviour(m) for m in model.modules()] == before
