"""Learned roundings on small networks with real digits: they help, they resume, they stay in bounded memory."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import nn

from qexp.calibration.calibrate import calibrate
from qexp.errors import QexpError
from qexp.layers.quantized import quantizers
from qexp.layers.swap import quantizers_off, swap
from qexp.models.modules import Add
from qexp.network.facts import facts
from qexp.numerics import PerChannel
from qexp.passes.base import PassContext
from qexp.passes.reconstruction import learn as learning
from qexp.passes.reconstruction import reconstruct
from qexp.passes.reconstruction.adaround import AdaRound
from qexp.passes.reconstruction.brecq import BRECQ
from qexp.passes.reconstruction.capture import importance
from qexp.passes.reconstruction.qdrop import QDrop
from qexp.passes.reconstruction.store import Store
from qexp.passes.reconstruction.units import Unit
from qexp.quantizers.learned_rounding import LearnedRounding
from qexp.quantizers.lsq import LSQ
from qexp.ranges import MSE

SHORT = {"iterations": 40, "batch": 16}


def short(method: type) -> dict[str, int]:
    """Returns options of a few iterations."""
    return SHORT | ({"step_iterations": 40} if method is BRECQ else {})


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(6, 6, 3, padding=1), nn.Conv2d(6, 6, 3, padding=1)
        self.relu1, self.add, self.relu2 = nn.ReLU(), Add(), nn.ReLU()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.relu2(self.add(self.conv2(self.relu1(self.conv1(x))), x))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.relu, self.block = nn.Conv2d(1, 6, 3, padding=1), nn.ReLU(inplace=True), Block()
        self.flat, self.fc = nn.Flatten(), nn.Linear(6 * 64, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(self.flat(self.block(self.relu(self.stem(x)))))


@pytest.fixture
def made(digit_images):
    """Call with bits of weights and inputs; returns a quantized, calibrated network and what passes see of it."""

    def make(wbits: int = 3, abits: int = 4, folder=None) -> tuple[nn.Module, PassContext]:
        torch.manual_seed(0)
        net = Net().eval()
        images = list(digit_images.split(16))
        structure = facts(net, images[0])
        for name in ("stem", "block.conv1", "block.conv2", "fc"):
            layer = net.get_submodule(name)
            weight = LearnedRounding(
                wbits, tuple(layer.weight.shape), signed=True, granularity=PerChannel(0), range=MSE()
            )
            weight.name = name
            step = LSQ(abits, (1, *structure.shapes[name]["input"][1:]), range=MSE())
            swap(layer, {"weight": weight, "input": step})
        calibrate(net, images, progress=False)
        return net, PassContext(structure, images, {}, folder=folder, progress=False)

    return make


def codes(net: nn.Module) -> dict[str, torch.Tensor]:
    return {n: q.codes(net.get_submodule(n).weight) for n, s, q in quantizers(net) if s == "weight"}


def output_error(net: nn.Module, images: torch.Tensor) -> float:
    with torch.no_grad():
        with quantizers_off(net):
            target = net(images)
        return float((net(images) - target).square().mean())


@pytest.mark.parametrize("method", [AdaRound, BRECQ, QDrop])
def test_it_beats_nearest_rounding_and_leaves_the_float_network_alone(made, digit_images, method):
    net, context = made()
    with torch.no_grad(), quantizers_off(net):
        floating = net(digit_images)
    before, grad = output_error(net, digit_images), [p.requires_grad for p in net.parameters()]
    method(**short(method)).on_fitted(net, context)
    assert output_error(net, digit_images) < 0.9 * before
    with torch.no_grad(), quantizers_off(net):
        assert torch.equal(net(digit_images), floating)
    assert [p.requires_grad for p in net.parameters()] == grad
    assert context.findings["roundings_moved"] > 1 and context.findings["reconstructed_units"] in (3, 4)
    for name, site, q in quantizers(net):
        if site == "weight":
            w = net.get_submodule(name).weight.detach()
            assert torch.equal(q(w), q.dequantize(q.codes(w)))
            assert ((q(w) - w).abs() < 1.001 * q.scale)[
                (w / q.scale >= q.limits[0]) & (w / q.scale <= q.limits[1])
            ].all()


def test_a_layer_alone_beats_nearest_rounding_on_real_images(digit_images):
    """The mean squared error of one convolution's output, images it was not learned on included."""
    torch.manual_seed(3)
    net = nn.Sequential(nn.Conv2d(1, 8, 3), nn.Flatten(), nn.Linear(8 * 36, 4)).eval()
    images = list(digit_images[:48].split(16))
    structure = facts(net, images[0])
    for name in ("0", "2"):
        w = net.get_submodule(name).weight
        swap(net.get_submodule(name), {"weight": LearnedRounding(3, tuple(w.shape), signed=True)})
    calibrate(net, images, progress=False)
    unseen = digit_images[48:]
    before = output_error(net[0], unseen)
    AdaRound(iterations=300, batch=16).on_fitted(net, PassContext(structure, images, {}, progress=False))
    assert output_error(net[0], unseen) < 0.9 * before


def test_the_same_seed_gives_the_same_codes_and_another_seed_others(made):
    found = []
    for seed in (0, 0, 1):
        net, context = made()
        context.seed = seed
        QDrop(**SHORT).on_fitted(net, context)
        found.append(codes(net))
    assert all(torch.equal(found[0][k], found[1][k]) for k in found[0])
    assert any(not torch.equal(found[0][k], found[2][k]) for k in found[0])


@pytest.mark.parametrize("method", [AdaRound, BRECQ])
def test_a_killed_run_goes_on_at_the_next_unit_and_ends_the_same(made, tmp_path, monkeypatch, method):
    whole, context = made(folder=tmp_path / "whole")
    method(**short(method)).on_fitted(whole, context)

    calls, real = [], reconstruct.learn

    def dies(*args):
        calls.append(args[0].name)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(*args)

    killed, context = made(folder=tmp_path / "killed")
    monkeypatch.setattr(reconstruct, "learn", dies)
    with pytest.raises(KeyboardInterrupt):
        method(**short(method)).on_fitted(killed, context)
    assert all(isinstance(m.weight_quantizer, LearnedRounding) for m in (killed.stem, killed.block.conv1, killed.fc))
    again, context = made(folder=tmp_path / "killed")
    calls.clear()
    monkeypatch.setattr(reconstruct, "learn", lambda *args: calls.append(args[0].name) or real(*args))
    method(**short(method)).on_fitted(again, context)
    state, same = again.state_dict(), whole.state_dict()
    assert state.keys() == same.keys() and all(torch.equal(state[k], same[k]) for k in same)
    assert calls and "stem" not in calls[:1], "what was learned is not learned again"


def test_units_kept_for_another_content_are_not_taken(made, tmp_path):
    net, context = made(folder=tmp_path)
    AdaRound(**SHORT).on_fitted(net, context)
    alone, context = made(wbits=4)
    AdaRound(**SHORT).on_fitted(alone, context)
    beside, context = made(wbits=4, folder=tmp_path)
    AdaRound(**SHORT).on_fitted(beside, context)
    assert all(torch.equal(codes(alone)[k], v) for k, v in codes(beside).items())


def test_spilling_to_disk_changes_nothing_and_leaves_nothing(made, tmp_path):
    found = []
    for memory_mb in (1024, 0.1, 0):
        net, context = made(folder=tmp_path / str(memory_mb))
        QDrop(**SHORT, memory_mb=memory_mb, loss="fisher_diag").on_fitted(net, context)
        found.append((codes(net), context.findings))
        assert context.findings["reconstruct_kept_mb"] <= memory_mb
        assert not list((tmp_path / str(memory_mb)).rglob("*.activations"))
    for other, findings in found[1:]:
        assert findings["reconstruct_spilled_mb"] > 0
        assert all(torch.equal(other[k], v) for k, v in found[0][0].items())


def test_a_full_disk_is_said_before_anything_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 10})())
    with pytest.raises(QexpError, match="do not fit in memory_mb nor on the disk"):
        Store(0, tmp_path).room(10, torch.zeros(2, 3, 4, 4))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_mixing_takes_each_element_from_one_side_at_the_chance_asked_for(layout):
    a, b = (torch.randn(7, 5, 9, 11).contiguous(memory_format=layout) for _ in range(2))
    for prob in (0.0, 0.25, 0.5):
        y = learning.mixed(a, b, prob, torch.Generator().manual_seed(0))
        taken = (y == a).double()
        assert ((y == a) | (y == b)).all() and abs(taken.mean() - prob) < 0.03
        assert (taken.mean((0, 2, 3)) - prob).abs().max() < 0.08, "in every channel"


def test_drop_prob_1_is_the_method_without_dropping(made, monkeypatch):
    """No number is drawn and no float input is kept; with 0 the activation quantizers have no part in the learning."""
    net, context = made()
    monkeypatch.setattr(learning, "mixed", lambda *_: pytest.fail("mixed an activation"))
    QDrop(**SHORT, drop_prob=1.0, step_lr=0.0, units="layers").on_fitted(net, context)
    plain, context = made()
    AdaRound(**SHORT).on_fitted(plain, context)
    assert all(torch.equal(codes(plain)[k], v) for k, v in codes(net).items())


def test_drop_prob_0_learns_as_if_activations_were_float(made, monkeypatch):
    monkeypatch.setattr(reconstruct, "total", lambda *_: 0.0)  # so that no unit is taken back
    found = []
    for abits in (2, 8):
        net, context = made(abits=abits)
        QDrop(**SHORT, drop_prob=0.0, step_lr=0.0).on_fitted(net, context)
        found.append(codes(net))
    assert all(torch.equal(found[0][k], v) for k, v in found[1].items())


@pytest.mark.slow
@pytest.mark.parametrize("method", [BRECQ, QDrop])
def test_steps_are_learned_from_a_poor_start(made, digit_images, method):
    net, context = made(wbits=6, abits=4)
    steps = {n: q.scale for n, s, q in quantizers(net) if s == "input"}
    with torch.no_grad():
        steps["block.conv2"] *= 3
    poor, before = steps["block.conv2"].item(), output_error(net, digit_images)
    options = {"step_iterations": 150} if method is BRECQ else {}
    method(iterations=150, batch=16, step_lr=5e-3, **options).on_fitted(net, context)
    assert 0 < steps["block.conv2"].item() < 0.9 * poor and output_error(net, digit_images) < 0.8 * before


def test_importance_is_the_closed_form_at_the_scores(made):
    """The gradient of the divergence to the scores is `softmax(quantized) - softmax(float)`; in numpy, float64."""
    net, context = made(abits=2)
    unit = Unit("fc", ("fc",))
    found = importance(net, context.facts, unit, context.images, Store(10))[:].double().numpy()
    with torch.no_grad():
        quantized = torch.cat([net(x) for x in context.images]).double().numpy()
        with quantizers_off(net):
            floating = torch.cat([net(x) for x in context.images]).double().numpy()

    def softmax(z: np.ndarray) -> np.ndarray:
        e = np.exp(z - z.max(1, keepdims=True))
        return e / e.sum(1, keepdims=True)

    squares = (softmax(quantized) - softmax(floating)) ** 2
    np.testing.assert_allclose(found, (1 + squares / squares.mean(1, keepdims=True)) / 2, rtol=2e-3)
    np.testing.assert_allclose(found.mean(1), 1, rtol=1e-5)


def test_importance_is_even_where_nothing_is_quantized(made):
    net, context = made()
    for layer in (net.stem, net.block.conv1, net.block.conv2, net.fc):
        layer.enabled = False
    found = importance(net, context.facts, Unit("block", ()), context.images, Store(10))
    assert (found[:] == 1).all()


def test_a_unit_that_ends_worse_keeps_what_it_had(made):
    net, context = made()
    before = copy.deepcopy(net.state_dict())
    AdaRound(iterations=2, batch=16, lr=50.0).on_fitted(net, context)  # throws every rounding anywhere
    after = net.state_dict()
    assert context.findings["roundings_moved"] == 0
    assert all(torch.equal(after[k], v) for k, v in before.items())


def test_it_stops_where_every_rounding_is_decided(made):
    net, context = made()
    ticks: list[int] = []
    real = reconstruct.learn

    def counted(*args):
        ticks.append(real(*args))
        return ticks[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reconstruct, "learn", counted)
        AdaRound(iterations=400, batch=16, lr=0.1, strength=1.0, beta=(2, 2)).on_fitted(net, context)
    assert max(ticks) < 400 and context.findings["roundings_undecided"] == 0


def test_bad_input(made):
    net, context = made()
    with pytest.raises(QexpError, match=r"64 calibration images do not fill a batch of 65.*n_calibrate.*at most 64"):
        AdaRound(batch=65).on_fitted(net, context)
    with pytest.raises(QexpError, match=r"loss='fisher' is not allowed; use mse, fisher_diag"):
        BRECQ(loss="fisher")
    with pytest.raises(QexpError, match=r"drop_prob=1.5 is not allowed; use 0..1"):
        QDrop(drop_prob=1.5)
    with pytest.raises(QexpError, match=r"memory_mb=-1 is not allowed; use 0"):
        AdaRound(**SHORT, memory_mb=-1)
    with torch.no_grad():
        net.block.conv2.bias.fill_(float("inf"))
    with pytest.raises(QexpError, match=r"block.conv2: the reconstruction error is (nan|inf)"):
        AdaRound(**SHORT).on_fitted(net, context)
