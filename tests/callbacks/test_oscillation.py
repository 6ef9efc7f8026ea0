"""Oscillating weights: counted as the paper does, frozen where their average lies, pulled by the damping's exact gradient."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from qexp.callbacks.oscillation import Memory, Oscillation
from qexp.layers.swap import swap
from qexp.numerics.granularity import PerChannel
from qexp.quantizers.lsq import LSQ
from qexp.quantizers.uniform import Uniform
from qexp.ranges import Fixed


def layer(weight: list[list[float]], quantizer: nn.Module | None = None) -> nn.Sequential:
    """A linear layer whose weight is quantized to 3 bits with a step of 1 (codes -4..3)."""
    linear = nn.Linear(len(weight[0]), len(weight), bias=False)
    with torch.no_grad():
        linear.weight.copy_(torch.tensor(weight))
    quantizer = quantizer or LSQ(3, linear.weight.shape, signed=True)
    with torch.no_grad():
        quantizer.scale.fill_(1.0)
    quantizer.take_sign(True)
    quantizer.mark_ready()
    swap(linear, {"weight": quantizer})
    return nn.Sequential(linear)


def test_a_turn_is_a_change_against_the_change_before_it():
    """Codes 0 1 0 0 1 1 2 1: turns at steps 2, 4 and 7; standing still and going on are none."""
    memory = Memory(torch.zeros(1, dtype=torch.int32), freezing=False)
    expected = 0.0
    for code, turned in zip((1, 0, 0, 1, 1, 2, 1), (0, 1, 0, 1, 0, 0, 1)):
        memory.update(torch.tensor([code], dtype=torch.int32), 0.1)
        expected = 0.1 * turned + 0.9 * expected
        assert memory.frequency.item() == pytest.approx(expected)


def test_a_frozen_weight_stays_on_the_code_it_was_at_most(monkeypatch):
    model = layer([[0.4, 0.45]])
    weight = model[0].weight
    follower = Oscillation(momentum=0.1, freeze=0.25)
    follower.follow(model)
    for step in range(
        40
    ):  # the first weight is thrown to and fro over the threshold at 0.5, mostly below; the second rests
        with torch.no_grad():
            weight[0, 0] = 0.6 if step % 3 == 0 else 0.4
        follower.after_step(step / 40)
    memory = follower.memory["0"]
    assert memory.frozen.tolist() == [[True, False]] and weight.tolist() == [[0.0, pytest.approx(0.45)]]
    with torch.no_grad():
        weight.add_(5.0)
        model[0].weight_quantizer.scale.fill_(0.5)
    follower.after_step(1.0)
    assert memory.codes.tolist() == [[0, 3]] and weight[0, 0] == 0.0
    assert model[0].weight_quantizer.codes(weight).tolist() == [[0.0, 3.0]]
    assert {n: (o, f) for n, o, f in follower.shares()}["0"][1] == 50.0


def test_a_frozen_weight_follows_its_scale():
    model = layer([[1.4, 0.0]])
    follower = Oscillation(momentum=0.5, freeze=0.1)
    follower.follow(model)
    for value in (1.6, 1.4, 1.6, 1.6):
        with torch.no_grad():
            model[0].weight[0, 0] = value
        follower.after_step(0.5)
    code = follower.memory["0"].codes[0, 0].item()
    with torch.no_grad():
        model[0].weight_quantizer.scale.fill_(0.7)
    follower.after_step(0.5)
    assert code in (1, 2) and model[0].weight[0, 0].item() == pytest.approx(0.7 * code)


def test_the_pull_is_the_gradient_of_the_damping_loss():
    """Against autograd of `lambda |w^ - clip(w)|^2` with w^ held constant, inside, on a tie and beyond both limits."""
    model = layer([[0.3, -1.2, 2.5, 7.0, -9.0, 0.0]])
    weight, quantizer = model[0].weight, model[0].weight_quantizer
    copy = weight.detach().clone().requires_grad_()
    (0.02 * (quantizer(weight).detach() - copy.clamp(-4, 3)).square().sum()).backward()
    weight.grad = torch.ones_like(weight)
    Oscillation.follow(follower := Oscillation(dampen=0.02), model)
    follower.pull(1.0)
    torch.testing.assert_close(weight.grad, 1 + copy.grad)
    assert copy.grad[0, 3] == copy.grad[0, 4] == 0


def test_the_pull_and_the_threshold_move_along_half_cosines():
    model = layer([[0.3, 0.2]])
    follower = Oscillation(dampen=0.02, freeze=[0.04, 0.01])
    follower.follow(model)
    pulls = []
    for progress in (0.0, 0.5, 1.0):
        model[0].weight.grad = torch.zeros(1, 2)
        follower.pull(progress)
        pulls.append(model[0].weight.grad[0, 0].item())
    assert pulls == pytest.approx([0.0, 2 * 0.01 * 0.3, 2 * 0.02 * 0.3])
    assert [follower.threshold(p) for p in (0, 0.5, 1)] == pytest.approx([0.04, 0.025, 0.01])


@pytest.mark.parametrize("axis", [None, 0])
def test_any_method_with_codes_of_the_weight_can_be_held(axis):
    quantizer = Uniform(3, (2, 2), signed=True, granularity=PerChannel(0) if axis == 0 else None, range=Fixed(-3, 3))
    model = layer([[0.4, 1.2], [0.1, -0.7]], quantizer)
    follower = Oscillation(momentum=0.5, freeze=0.2, dampen=0.1)
    follower.follow(model)
    for step in range(6):
        with torch.no_grad():
            model[0].weight[0, 0] = 0.6 if step % 2 else 0.4
        model[0].weight.grad = torch.zeros(2, 2)
        follower.pull(0.5)
        follower.after_step(0.5)
    assert follower.memory["0"].frozen.sum() == 1 and math.isfinite(model[0].weight.grad.sum())


def test_what_is_remembered_can_be_saved_and_taken_up():
    model = layer([[0.4, 0.45]])
    follower = Oscillation(freeze=0.02)
    follower.follow(model)
    with torch.no_grad():
        model[0].weight.fill_(1.6)
    follower.after_step(0.1)
    saved = follower.state_dict()["0"]
    assert saved.keys() == {"codes", "direction", "frequency", "average", "frozen"}
    assert saved["codes"].tolist() == [[2, 2]] and saved["direction"].tolist() == [[1, 1]]
