"""Activations of Quantized_ResNet: fixed steps, the clip that moves in the step, the sigmoid surrogate, powers of two."""

from __future__ import annotations

import pytest
import torch

from qexp.errors import QexpError
from qexp.quantizers.exponential import Exponential
from qexp.quantizers.fixed_step import FixedStep
from qexp.quantizers.pact_in_step import PACTInStep
from qexp.quantizers.sigmoid_surrogate import SigmoidSurrogate, bump
from qexp.ranges import MinMax
from qexp.statistics.stats import TensorStats


def ready(q, x=(0.0, 1.0)):
    q.fit(TensorStats.of(torch.tensor(x)))
    return q


def grads(q, x, g):
    x = torch.tensor(x, requires_grad=True)
    y = q(x)
    (y * torch.tensor(g)).sum().backward()
    return y.detach(), x.grad


def test_fixed_step_vector():
    q = ready(FixedStep(2, (8,), signed=False))
    assert q(torch.tensor([-1, 0.49, 0.5, 0.51, 1.5, 2.5, 2.51, 3.7])).tolist() == [0, 0, 0, 1, 2, 2, 3, 3]
    assert q.levels == 4


def test_fixed_step_gradient_is_strict():
    _, dx = grads(ready(FixedStep(2, (6,), signed=False)), [-0.1, 0.0, 0.1, 2.9, 3.0, 3.1], [1.0] * 6)
    assert dx.tolist() == [0, 0, 1, 1, 0, 0]


def test_fixed_step_signs():
    x = torch.tensor([-9.0, -2.4, 1.6, 9.0])
    q = FixedStep(3, (4,))
    q.fit(TensorStats.of(x))
    assert q(x).tolist() == [-4, -2, 2, 3] and q.levels == 8
    q.fit(TensorStats.of(x), followed_by_relu=True)
    assert q(x).tolist() == [0, 0, 2, 7]


def test_pact_in_step_vector_as_a_parameter_group():
    q = ready(PACTInStep(2, (6,), signed=False))
    y, dx = grads(q, [-1, 0.5, 1.2, 2.9, 3.1, 4], [0.1, 0.2, -0.3, 0.4, 0.5, -0.2])
    assert y.tolist() == [0, 0, 1, 3, 3, 3]
    assert dx.tolist() == pytest.approx([0, 0.2, -0.3, 0.4, 0, 0])
    assert float(q.alpha.grad) == pytest.approx(0.3)
    torch.optim.SGD([{"params": [q.alpha], "lr": 0.01, "momentum": 0.0, "weight_decay": 2e-4}], 1.0, 0.9).step()
    assert float(q.alpha.detach()) == pytest.approx(2.996994, abs=1e-6)


def test_pact_in_step_boundaries_belong_to_neither_side():
    q = ready(PACTInStep(2, (5,), signed=False))
    _, dx = grads(q, [0.0, 1e-3, 2.999, 3.0, 3.001], [1.0] * 5)
    assert dx.tolist() == [0, 1, 1, 0, 0] and float(q.alpha.grad) == 1


def test_pact_in_step_on_a_signed_tensor():
    q = ready(PACTInStep(3, (5,)), (-9.0, 9.0))
    y, dx = grads(q, [-9.0, -1.2, 0.0, 2.8, 9.0], [1.0, 2.0, 3.0, 4.0, 5.0])
    assert y.tolist() == [-3, -1, 0, 3, 3] and q.levels == 7
    assert dx.tolist() == [0, 2, 3, 4, 0] and float(q.alpha.grad) == 5 - 1


def test_pact_in_step_starts():
    assert float(ready(PACTInStep(4, (1,), signed=False)).alpha.detach()) == 15
    assert float(ready(PACTInStep(4, (1,), signed=False, range=2.5)).alpha.detach()) == 2.5
    assert float(ready(PACTInStep(4, (1,), signed=False, range=MinMax()), (0.0, 7.0)).alpha.detach()) == 7
    q = ready(PACTInStep(4, (1,), signed=False))
    with torch.no_grad():
        q.alpha.fill_(-3.0)
    q.on_optimizer_step(None)
    assert float(q.alpha.detach()) > 0


@pytest.mark.parametrize("form", ["normalized", "legacy"])
def test_surrogate_vector(form):
    x = torch.tensor([0.1, 0.25, 0.5, 0.75, 1.0], dtype=torch.float64)
    h = bump(x, torch.tensor(3.0), 3.0, torch.tensor(1.0), form)
    assert h.tolist() == pytest.approx([0.980982, 1.004963, 1.020747, 1.004963, 0.959517], abs=1e-6)


@pytest.mark.parametrize("sharpness", [0.5, 1.0, 5.0, 100.0])
@pytest.mark.parametrize("clip", [1.7, 3.0])
def test_the_normalized_bump_averages_to_one_over_a_step_and_legacy_shrinks(sharpness, clip):
    x = (torch.arange(30000, dtype=torch.float64) + 0.5) / 30000 * clip / 3
    a = torch.tensor(sharpness)
    normalized, legacy = (bump(x, torch.tensor(clip), 3.0, a, f) for f in ("normalized", "legacy"))
    assert float(normalized.mean()) == pytest.approx(1, abs=2e-4)
    if clip == 3.0:  # T = n: legacy is normalized / a
        assert torch.allclose(legacy * sharpness, normalized)


def test_surrogate_multiplies_the_gradient_and_nothing_else():
    options = {"signed": False, "start_sharpness": 2.0, "learned": True}
    q, plain = ready(SigmoidSurrogate(2, (6,), **options)), ready(PACTInStep(2, (6,), signed=False))
    x, g = [-0.4, 0.1, 0.5, 1.9, 2.9, 3.4], [0.5, 1.0, -2.0, 0.3, 1.0, 4.0]
    (y, dx), (y0, dx0) = grads(q, x, g), grads(plain, x, g)
    h = bump(torch.tensor(x), torch.tensor(3.0), 3.0, torch.tensor(2.0), "normalized")
    assert torch.equal(y, y0) and torch.allclose(dx, dx0 * h) and torch.equal(q.alpha.grad, plain.alpha.grad)


def test_sharpness_follows_the_training_and_its_resumption():
    q = SigmoidSurrogate(2, (1,), signed=False, start_sharpness=1.0, end_sharpness=5.0)
    q.on_training_start(None, 8)
    seen = [float(q.sharpness)]
    for step in range(10):
        if step == 3:
            twin = SigmoidSurrogate(2, (1,), signed=False, start_sharpness=1.0, end_sharpness=5.0)
            twin.load_state_dict(q.state_dict(), strict=True)
            q = twin
            q.on_training_start(None, 8)
        q.on_optimizer_step(None)
        seen.append(float(q.sharpness))
    assert seen == [1.0, 1.5, 2.0, 2.5, 3.0, 3.5, 4.0, 4.5, 5.0, 5.0, 5.0]


def test_exponential_vectors():
    house = ready(Exponential(2, (7,), signed=False, range=2.0))
    assert house(torch.tensor([-0.5, 0.05, 0.3, 0.7, 1.1, 1.9, 6])).tolist() == [0, 0, 0, 0.5, 1, 2, 2]
    source = ready(Exponential(2, (6,), range=3.0, form="source"))
    x = torch.tensor([0.1, 0.3, 0.5, 1, 2, 5])
    assert source.codes(x).tolist() == [-2, 0, 0, 1, 2, 3]
    assert source(x).tolist() == pytest.approx([0.09375, 0.375, 0.375, 0.75, 1.5, 3])
    assert torch.equal(source(-x), source(x)) and source(torch.zeros(1)).tolist() == [0]


@pytest.mark.parametrize("bits", range(1, 7))
def test_exponential_levels(bits):
    n = 2**bits - 1
    q = ready(Exponential(bits, (1,), signed=False, range=3.0))
    levels = q(torch.logspace(-70, 3, 4000, base=2)).unique()
    assert len(levels) == q.levels == 2**bits
    assert levels.tolist() == [0.0] + [3.0 * 2.0 ** (e - n) for e in range(1, n + 1)]
    if bits > 1:
        two_sided = ready(Exponential(bits, (1,)), (-3.0, 3.0))
        x = torch.logspace(-70, 3, 4000, base=2)
        assert len(two_sided(torch.cat([-x, x])).unique()) == two_sided.levels == 2**bits - 1


def test_exponential_gradient_is_strict():
    _, dx = grads(ready(Exponential(2, (5,), signed=False, range=2.0)), [-0.1, 0.0, 0.1, 2.0, 2.1], [1.0] * 5)
    assert dx.tolist() == [0, 0, 1, 0, 0]


@pytest.mark.parametrize(
    "make",
    [
        lambda: Exponential(7, (1,)),
        lambda: Exponential(4, (1,), range=0.0),
        lambda: Exponential(4, (1,), form="paper"),
        lambda: Exponential(4, (1,), rounding="half_up"),
        lambda: SigmoidSurrogate(4, (1,), form="paper"),
        lambda: SigmoidSurrogate(4, (1,), start_sharpness=0.0),
        lambda: PACTInStep(17, (1,)),
        lambda: FixedStep(0, (1,)),
    ],
)
def test_what_makes_no_sense_is_refused_by_name(make):
    with pytest.raises(QexpError, match="allowed"):
        make()
