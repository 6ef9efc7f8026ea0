"""BWN, the sign, and 1-bit weights with memory: published vectors, closed-form gradients, what is remembered and when."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from qexp.errors import QexpError
from qexp.numerics.granularity import PerChannel
from qexp.quantizers.bwn import BWN
from qexp.quantizers.hysteresis import Hysteresis
from qexp.quantizers.sign import Sign
from qexp.statistics.stats import TensorStats

W = torch.tensor([0.5, -0.2, 0.3, -1.4])
G = torch.tensor([1.0, -2.0, 0.5, 1.0])
BEFORE = torch.tensor([-0.2, -0.05, 0.3, 0.02, -0.4, 0.5])
AFTER = torch.tensor([0.15, 0.04, -0.2, -0.03, -0.5, 0.6])


def stepped(latents: list[torch.Tensor], **options) -> Hysteresis:
    """Returns a quantizer that saw one optimizer step between each two latents."""
    q = Hysteresis(1, tuple(latents[0].shape), **options)
    q.on_training_start(latents[0], len(latents) - 1)
    for latent in latents[1:]:
        q.on_optimizer_step(latent)
    return q


def gradient(q: nn.Module, w: torch.Tensor, g: torch.Tensor) -> torch.Tensor:
    w = w.clone().requires_grad_()
    (q(w) * g).sum().backward()
    return w.grad


def test_bwn_vector():
    q = BWN(1, (4,))
    assert torch.allclose(q(W), torch.tensor([0.6, -0.6, 0.6, -0.6]), atol=1e-6)
    assert q(torch.zeros(4)).tolist() == [0, 0, 0, 0] and q.codes(torch.zeros(4)).tolist() == [1, 1, 1, 1]


@pytest.mark.parametrize(
    ("form", "expected"),
    [
        ("ste", G),
        ("paper", torch.tensor([0.85, -1.7, 0.425, 0.25])),
        # sum of g q = 1 + 2 + 0.5 - 1 = 2.5: sign(w) * 2.5 / 4, plus 0.6 g where |w| <= 1
        ("exact", torch.tensor([0.625 + 0.6, -0.625 - 1.2, 0.625 + 0.3, -0.625])),
    ],
)
def test_bwn_gradients(form, expected):
    assert torch.allclose(gradient(BWN(1, (4,), gradient=form), W, G), expected, atol=1e-6)


def test_bwn_exact_gradient_is_that_of_the_scale_where_the_sign_is_constant():
    w = torch.tensor([[[[1.5, -2.0]]], [[[3.0, 1.2]]]], dtype=torch.float64, requires_grad=True)
    q = BWN(1, tuple(w.shape), granularity=PerChannel(0), gradient="exact").double()
    g = torch.tensor([[[[0.3, -0.7]]], [[[1.1, 0.4]]]], dtype=torch.float64)
    (q(w) * g).sum().backward()
    v = w.detach().clone().requires_grad_()  # beyond |w| <= 1 only the mean magnitude moves the result
    (v.abs().mean((1, 2, 3), keepdim=True) * torch.sign(v).detach() * g).sum().backward()
    assert torch.allclose(w.grad, v.grad, atol=1e-7)


def test_bwn_scale_options():
    w = torch.stack([W, 2 * W]).reshape(2, 4, 1, 1)
    channel, tensor = BWN(1, w.shape, granularity=PerChannel(0)), BWN(1, w.shape)
    assert channel(w).abs().flatten().tolist() == pytest.approx([0.6] * 4 + [1.2] * 4)
    assert tensor(w).abs().flatten().tolist() == pytest.approx([0.9] * 8)
    assert set(BWN(1, w.shape, scaled=False)(w).flatten().tolist()) == {-1.0, 1.0}
    assert channel.levels == tensor.levels == 2


def test_bwn_latent_clip_is_an_option():
    for clip, most in ((True, 1.0), (False, 1.4)):
        latent = nn.Parameter(W.clone())
        BWN(1, (4,), clip_latent=clip).on_optimizer_step(latent)
        assert float(latent.detach().abs().max()) == pytest.approx(most)


@pytest.mark.parametrize(
    "make",
    [
        lambda: BWN(2, (4,)),
        lambda: Hysteresis(2, (4,)),
        lambda: Sign(4, (4,)),
        lambda: BWN(1, (4,), gradient="none"),
        lambda: BWN(1, (4,), scaled=False, gradient="exact"),
        lambda: Hysteresis(1, (4,), rule="old"),
        lambda: Hysteresis(1, (4,), tau=-0.1),
        lambda: Hysteresis(1, (4,), tau_mode="relative"),
        lambda: Hysteresis(1, (4, 1), granularity=PerChannel(0)),
        lambda: Sign(1, (4,), signed="yes"),
    ],
)
def test_what_makes_no_sense_is_refused_by_name(make):
    with pytest.raises(QexpError, match=r"BWN|Hysteresis|Sign"):
        make()


def test_sign_gradient_and_forms():
    x = torch.tensor([-2.0, -1.0, -0.3, 0.0, 1.0, 1.1])
    q = Sign(1, (6,))
    q.fit(TensorStats.of(x))
    assert q(x).tolist() == [-1, -1, -1, 1, 1, 1]
    assert gradient(q, x, torch.ones(6)).tolist() == [0, 1, 1, 1, 1, 0]
    q.fit(TensorStats.of(x.clamp_min(0)))
    assert q(x).tolist() == [0, 0, 0, 0, 1, 1] and q.levels == 2
    with pytest.raises(QexpError, match="never negative"):
        Sign(1, (6,), signed=True).fit(TensorStats.of(x.clamp_min(0)))


def test_hysteresis_vectors():
    omega = 0.2533333
    figure, legacy = stepped([BEFORE, AFTER]), stepped([BEFORE, AFTER], rule="legacy")
    assert figure(AFTER).tolist() == pytest.approx([omega, -omega, -omega, omega, -omega, omega], abs=1e-6)
    assert legacy(AFTER).tolist() == pytest.approx([omega, 0.010133, -omega, -0.0076, -omega, omega], abs=1e-6)
    assert int(figure.non_binary) == 0 and int(legacy.non_binary) == 2
    assert "2 of 6 weights not binary" in legacy.describe()["range"]
    assert torch.equal(legacy.dequantize(legacy.codes(AFTER)), legacy(AFTER))


def test_legacy_forgets_after_one_step():
    still = stepped([BEFORE, AFTER, AFTER], rule="legacy")
    assert (
        int(still.non_binary) == 0
        and int(still.most_non_binary) == 2
        and torch.equal(still.codes(AFTER), (AFTER >= 0).int())
    )
    figure = stepped([BEFORE, AFTER, AFTER])
    assert figure.codes(AFTER).tolist() == [1, 0, 0, 1, 0, 1]


def test_legacy_passes_a_zero_on_as_it_is():
    w = [torch.tensor([0.0, 0.3, -0.3, 0.0]), torch.tensor([0.5, 0.0, 0.0, 0.0])]
    q = stepped(w, rule="legacy")
    omega = 0.125
    assert q(w[1]).tolist() == pytest.approx([omega * 0.5, 0, 0, 0]) and int(q.non_binary) == 4


@pytest.mark.parametrize("rule", ["figure", "legacy"])
def test_without_a_threshold_it_is_the_plain_sign(rule):
    latent = torch.tensor([0.15, -0.04, 0.0, -0.0])
    assert stepped([-latent, latent], rule=rule, tau=0.0).codes(latent).tolist() == [1, 0, 1, 1]


@pytest.mark.parametrize(("mode", "unit"), [("omega", AFTER.abs().mean()), ("std", AFTER.std())])
def test_relative_thresholds(mode, unit):
    relative = stepped([BEFORE, AFTER], tau=0.5, tau_mode=mode)
    absolute = stepped([BEFORE, AFTER], tau=0.5 * float(unit))
    assert torch.equal(relative.state, absolute.state) and not torch.equal(relative.state, torch.sign(AFTER))


@pytest.mark.parametrize("latent", [torch.zeros(3), torch.tensor([0.2]), torch.full((3,), -0.2)])
@pytest.mark.parametrize("mode", ["absolute", "omega", "std"])
def test_degenerate_weights_stay_finite_and_binary(latent, mode):
    q = stepped([latent, latent, -latent], tau_mode=mode)
    assert torch.isfinite(q(-latent)).all() and int(q.non_binary) == 0


def test_strictly_one_bit_at_every_step_of_a_random_walk():
    torch.manual_seed(0)
    w = 0.1 * torch.randn(200)
    q, flips, plain = Hysteresis(1, (200,)), 0, 0
    q.on_training_start(w, 50)
    for _ in range(50):
        before, signs = q.state.clone(), torch.sign(w)
        w = w + 0.03 * torch.randn(200)
        q.on_optimizer_step(w)
        assert len(q(w).unique()) == 2 and int(q.non_binary) == 0
        flips, plain = flips + int((before != q.state).sum()), plain + int((signs != torch.sign(w)).sum())
    assert 0 < flips < plain / 2, "memory is there to keep signs from flipping to and fro"


@pytest.mark.parametrize("rule", ["figure", "legacy"])
def test_resume_goes_on_bit_exactly(rule):
    torch.manual_seed(1)
    walk = list((0.1 * torch.randn(20, 6, 3)).cumsum(0))
    whole = stepped(walk, rule=rule)
    first = stepped(walk[:9], rule=rule)
    resumed = Hysteresis(1, (6, 3), rule=rule)
    resumed.load_state_dict(copy.deepcopy(first.state_dict()), strict=True)
    resumed.on_training_start(walk[8], 19)
    for latent in walk[9:]:
        resumed.on_optimizer_step(latent)
    assert torch.equal(resumed(walk[-1]), whole(walk[-1])) and torch.equal(resumed.state, whole.state)


def test_neither_evaluation_nor_accumulated_gradients_move_the_memory():
    q = stepped([BEFORE, AFTER])
    state = q.state.clone()
    q.eval()
    q(-AFTER)
    q.train()
    for _ in range(3):
        gradient(q, -AFTER, torch.ones(6))
    assert torch.equal(q.state, state)


def test_a_loop_that_announces_no_start_begins_at_the_first_forward_of_training():
    q = Hysteresis(1, (6,))
    with torch.no_grad():
        q.eval()(AFTER)
    assert not q.started
    q.train()(BEFORE)
    q.on_optimizer_step(AFTER)
    assert torch.equal(q.state, stepped([BEFORE, AFTER]).state)


def test_hysteresis_gradients():
    g = torch.tensor([1.0, -2.0, 0.5, 1.0, 0.0, 3.0])
    assert torch.equal(gradient(stepped([BEFORE, AFTER]), AFTER, g), g)
    q = stepped([BEFORE, AFTER], omega_gradient=True)
    through = torch.sign(AFTER) * (g * q.state).sum() / 6
    assert torch.allclose(gradient(q, AFTER, g), g + through)
