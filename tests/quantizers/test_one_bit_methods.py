"""IR-Net, ReCU, AdaBin, RSign and the surrogates of a sign: published vectors, closed-form gradients, schedules, refusals."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from qexp.errors import QexpError
from qexp.numerics.granularity import PerChannel
from qexp.quantizers.adabin import AdaBinInput, AdaBinWeight
from qexp.quantizers.bwn import BWN
from qexp.quantizers.irnet import IRNet
from qexp.quantizers.recu import ReCU, scheduled_tau
from qexp.quantizers.rsign import RSign
from qexp.quantizers.sign import Sign
from qexp.quantizers.surrogate import sharpness, sign, slope
from qexp.statistics.stats import TensorStats

W = torch.tensor([0.5, -0.2, 0.3, -1.4, 0.1, 0.4])
G = torch.tensor([1.0, -2.0, 0.5, 1.0, 0.0, -1.0])
FILTERS = torch.tensor([[0.5, -0.3, 0.3, -1.4], [0.1, 0.7, -0.6, -0.05]])


def near(got: Tensor, *expected: float, tolerance: float = 2e-6) -> None:
    assert got.detach().flatten().tolist() == pytest.approx(expected, abs=tolerance, rel=tolerance)


def gradient(q: nn.Module, x: Tensor, g: Tensor) -> Tensor:
    x = x.clone().requires_grad_()
    (q(x) * g).sum().backward()
    return x.grad


def halfway(q):
    """Returns a quantizer whose `ede` has t = 1, k = 1: halfway from 0.1 to 10."""
    q.on_training_start(None, 2)
    q.on_optimizer_step(None)
    return q


def test_slopes():
    x = torch.tensor([-1.5, -1.0, -0.4, 0.0, 0.3, 0.9, 1.2])
    near(slope(x, "ste"), 0, 1, 1, 1, 1, 1, 0)
    near(slope(x, "approx"), 0, 0, 1.2, 2, 1.4, 0.2, 0)
    near(slope(x, "identity"), *[1.0] * 7)
    x = torch.tensor([-1, 0, 0.25, 2])
    near(slope(x, "ede", 0.1), 0.9900663, 1, 0.9993753, 0.961043)
    near(slope(x, "ede", 2.0), 0.1413016, 2, 1.572895, 0.002681901, tolerance=3e-6)


@pytest.mark.parametrize(
    ("tmin", "expected"), [(0.1, (0.1, 0.3162278, 1, 10)), (1e-3, (0.001, 0.01, 0.1, 10))], ids=["paper", "code"]
)
def test_sharpness_over_the_training(tmin, expected):
    assert [sharpness(f, tmin, 10.0) for f in (0, 0.25, 0.5, 1)] == pytest.approx(expected)


@pytest.mark.parametrize("kind", ["ste", "approx", "ede", "identity"])
def test_a_signs_gradient_is_the_slope_times_what_comes_back(kind):
    x = torch.linspace(-2, 2, 9).requires_grad_()
    g = torch.arange(9.0) - 3
    y = sign(x, kind, 2.0)
    (y * g).sum().backward()
    assert y.tolist() == [-1] * 4 + [1] * 5 and torch.allclose(x.grad, g * slope(x.detach(), kind, 2.0))


def test_irnet_vectors():
    q = halfway(IRNet(1, (6,)))
    near(q(W), 1, -1, 1, -1, 1, 1)
    z, scale, _ = q.parts(W.reshape(1, -1))
    near(z, 0.7785964, -0.2123445, 0.4954705, -1.9111, 0.2123445, 0.6370335)
    near(scale, 1)
    near(gradient(q, W, G), 1.077725, -2.31624, 0.8590865, 0.728143, 0.3365004, -0.6852154, tolerance=3e-6)
    wide = IRNet(1, (6,), tmin=0.1)
    near(gradient(wide, W, G), 1.761483, -2.765095, 0.9777626, 0.9337441, 0.188965, -1.096859, tolerance=3e-6)
    heavy = torch.tensor([0.01, -0.02, 0.03, 0, -0.01, 2.5, 0.02, -0.03])
    near(IRNet(1, (8,))(heavy), -0.5, -0.5, -0.5, -0.5, -0.5, 0.5, -0.5, -0.5)


def test_irnets_gradient_neither_moves_a_filter_along_itself_nor_as_a_whole():
    w, g = torch.randn(3, 2, 3, 3), torch.randn(3, 2, 3, 3)
    q = halfway(IRNet(1, w.shape, granularity=PerChannel(0)))
    moved = gradient(q, w, g).flatten(1)
    assert moved.sum(1).abs().max() < 1e-5 and (moved * w.flatten(1)).sum(1).abs().max() < 1e-5


def test_irnet_scales_are_powers_of_two_or_means_or_none():
    w = torch.randn(4, 5)
    assert IRNet(1, w.shape, granularity=PerChannel(0))(w).abs().log2().frac().eq(0).all()
    z = IRNet(1, w.shape, granularity=PerChannel(0)).parts(w)[0]
    assert torch.allclose(IRNet(1, w.shape, granularity=PerChannel(0), scale_by="mean")(w).abs()[:, 0], z.abs().mean(1))
    assert IRNet(1, w.shape, scale_by="none")(w).abs().eq(1).all()
    shifted = W + 5
    assert IRNet(1, (6,), balance="none")(shifted).gt(0).all() and IRNet(1, (6,), balance="centre")(shifted).lt(0).any()


@pytest.mark.parametrize("make", [IRNet, AdaBinWeight])
def test_filters_without_spread_are_refused_by_name_when_training_starts(make):
    w = torch.randn(3, 4)
    w[1] = 0.25
    q = make(1, (3, 4), granularity=PerChannel(0))
    q.name = "layer1.conv (weight)"
    assert torch.isfinite(q(w)).all()
    with pytest.raises(QexpError, match=r"layer1.conv \(weight\): degenerate_filter: .* in 1 of 3 filters"):
        q.on_training_start(w, 10)


def recu(tau: float) -> ReCU:
    q = ReCU(1, (2, 4), granularity=PerChannel(0), tau=tau)
    q.fit(TensorStats.of(FILTERS, PerChannel(0)))
    return q


def test_recu_vectors():
    q = recu(0.85)
    z = q.standardised(FILTERS)
    near(z, 2.401412, -0.2484219, 1.738953, -3.891943, 0.3307648, 3.506107, -3.373801, -0.4630707, tolerance=3e-6)
    near(q.edge(z), 2.401094)
    assert (z.abs() > q.edge(z)).int().tolist() == [[1, 0, 0, 1], [0, 1, 1, 0]]
    near(q.alpha, 0.625, 0.3625)
    q = recu(0.7)
    near(q.edge(z), 1.018744)
    with torch.no_grad():
        q.alpha.copy_(torch.tensor([[0.5], [0.25]]))
    near(q(FILTERS), 0.5, -0.5, 0.5, -0.5, 0.25, 0.25, -0.25, -0.25)
    g = torch.tensor([[1, -2, 0.5, 1], [0.2, -1, 1, 0.5]])
    latent = FILTERS.clone().requires_grad_()
    u, scale, _ = q.parts(latent)
    u.retain_grad()
    (sign(u, "identity") * scale * g).sum().backward()
    inside = (u.detach().abs() <= q.edge(u.detach())).float()
    near(u.grad * inside, 0, -1, 0, 0, 0.05, 0, 0, 0.125)
    near(q.alpha.grad, 2.5, -2.3)


def test_recus_gradient_reaches_the_weights_through_the_standardisation_alone():
    q, g = recu(0.7), torch.tensor([[1, -2, 0.5, 1], [0.2, -1, 1, 0.5]])
    got = gradient(q, FILTERS, g)
    w = FILTERS.clone().requires_grad_()
    z = q.standardised(w)
    inside = z.detach().abs() <= 1.018744
    (z * g * q.alpha.detach() * inside).sum().backward()
    assert torch.allclose(got, w.grad, atol=1e-6)


def test_recu_tau_follows_the_training():
    assert [scheduled_tau(f) for f in (0, 0.25, 0.5, 1)] == pytest.approx((0.85, 0.8731415, 0.9028557, 0.99))
    q = ReCU(1, (2, 4), granularity=PerChannel(0))
    q.fit(TensorStats.of(FILTERS, PerChannel(0)))
    z, edges = q.standardised(FILTERS), []
    q.on_training_start(FILTERS, 4)
    for _ in range(5):
        edges.append(float(q.edge(z) / z.abs().mean()))
        q.on_optimizer_step(FILTERS)
    assert [edges[i] for i in (0, 1, 2, 4)] == pytest.approx((1.203973, 1.371536, 1.638411, 3.912023), rel=1e-5)


def test_schedules_resume_where_they_were():
    for make in (IRNet, ReCU):
        q = make(1, (6,))
        q.fit(TensorStats.of(W))
        q.on_training_start(W, 10)
        for _ in range(7):
            q.on_optimizer_step(W)
        other = make(1, (6,))
        other.load_state_dict(q.state_dict(), strict=True)
        assert other.progress == q.progress == pytest.approx(0.7)
        assert torch.equal(gradient(other, W, G), gradient(q, W, G))


def test_adabin_weight_vectors():
    q = halfway(AdaBinWeight(1, (6,)))
    near(q(W), 0.5948514, -0.6948514, 0.5948514, -0.6948514, 0.5948514, 0.5948514)
    near(gradient(q, W, G), 0.8385474, -1.754279, 0.6451221, -0.1030574, 0.2171198, -0.3434532, tolerance=3e-6)


@pytest.mark.parametrize(
    ("centre", "levels"), [("paper", (-0.6, -0.6, -0.6, 1, 1)), ("code", (-0.64, -0.64, -0.64, 0.96, 0.96))]
)
def test_adabin_input_vectors(centre, levels):
    x, g = torch.tensor([-1.2, -0.3, 0.1, 0.6, 1.4]), torch.tensor([1, -1, 0.5, 2, 1])
    q = AdaBinInput(1, (5,), centre=centre)
    q.fit(TensorStats.of(x))
    with torch.no_grad():
        q.alpha.fill_(0.8)
        q.beta.fill_(0.2)
    near(q(x), *levels)
    near(gradient(q, x, g), 0, -0.75, 0.875, 2, 0)
    if centre == "paper":
        near(q.alpha.grad, 1.140625)
        near(q.beta.grad, 1.375)
    else:  # alpha (s + beta): d alpha gets beta sum g = 0.7 more, d beta alpha sum g instead of sum g
        near(q.alpha.grad, 1.140625 + 0.2 * 3.5)
        near(q.beta.grad, 1.375 - 3.5 + 0.8 * 3.5)


def test_adabin_starts_between_the_values_of_a_tensor_of_one_sign():
    x = torch.tensor([0.0, 1.0, 3.0, 0.4])
    q = AdaBinInput(1, (4,))
    q.fit(TensorStats.of(x))
    assert sorted(q.codes(x).tolist()) == [0, 0, 0, 1]
    near(q.beta, 1.1)
    near(q.alpha, 0.95)
    with torch.no_grad():
        q.alpha.fill_(-3)
    q.on_optimizer_step(None)
    near(q.alpha, 1e-3)


def test_the_convolution_of_two_adabin_tensors_is_four_terms_of_signs():
    aa, ba, aw, bw = 0.8, 0.2, 0.6, -0.05
    a, w = torch.tensor([1.0, -1, 1, 1, -1]), torch.tensor([1.0, 1, -1, 1, -1])
    for valid, y in ((slice(None), 0.51), ([0, 1, 3], 0.77)):
        d, s_a, s_w, k = a[valid] @ w[valid], a[valid].sum(), w[valid].sum(), len(a[valid])
        terms = aa * aw * d + aa * bw * s_a + ba * aw * s_w + ba * bw * k
        assert float(terms) == pytest.approx(y)
        assert float((aa * a[valid] + ba) @ (aw * w[valid] + bw)) == pytest.approx(y)


def test_rsign_vector():
    x, g = torch.tensor([-1, -0.2, 0.1, 0.35, 1.5]), torch.tensor([1, -1, 0.5, 2, 1])
    q = RSign(1, (5,))
    q.fit(TensorStats.of(x))
    with torch.no_grad():
        q.theta.fill_(0.3)
    assert q(x).tolist() == [-1, -1, -1, 1, 1]
    near(gradient(q, x, g), 0, -1, 0.8, 3.8, 0)
    near(q.theta.grad, -3.6)


def test_rsign_has_a_threshold_for_each_channel_and_starts_inside_a_channel_of_one_sign():
    x = torch.stack([torch.tensor([-1.0, 1.0, 3.0]), torch.tensor([0.0, 1.0, 5.0])])[None, :, :, None]
    q = RSign(1, x.shape, granularity=PerChannel(1))
    q.fit(TensorStats.of(x, PerChannel(1)))
    assert q.theta.flatten().tolist() == [0, 2]
    assert q(x).flatten().tolist() == [-1, 1, 1, -1, -1, 1], "no channel is constant"


def test_bwn_clipped_gradient_is_reactnets():
    w, g = torch.tensor([0.5, -0.2, 0.3, -1.4]), torch.tensor([1.0, -2.0, 0.5, 1.0])
    near(gradient(BWN(1, (4,), gradient="clipped"), w, g), 0.6, -1.2, 0.3, 0)


@pytest.mark.parametrize("normalize", ["train", "always"])
def test_a_normalised_sign_changes_the_gradient_alone(normalize):
    x = 5 * torch.randn(3, 2, 4, 4)
    q, plain = Sign(1, x.shape, gradient="approx", normalize=normalize), Sign(1, x.shape, gradient="approx")
    for s in (q, plain):
        s.fit(TensorStats.of(x))
    assert torch.equal(q(x), plain(x))
    got = gradient(q, x, torch.ones_like(x))
    u = x.clone().requires_grad_()
    z = u / u.flatten(1).std(1).reshape(3, 1, 1, 1)
    (z * slope(z.detach(), "approx")).sum().backward()
    assert torch.allclose(got, u.grad, atol=1e-5) and not torch.allclose(got, gradient(plain, x, torch.ones_like(x)))
    q.eval()
    same = torch.allclose(gradient(q, x, torch.ones_like(x)), gradient(plain, x, torch.ones_like(x)))
    assert same == (normalize == "train")


def test_one_sided_sign_takes_its_slope_about_one_half():
    x = torch.tensor([0.0, 0.4, 0.5, 0.6, 1.2])
    q = Sign(1, (5,), gradient="approx")
    q.fit(TensorStats.of(x))
    assert q(x).tolist() == [0, 0, 0, 1, 1]
    near(gradient(q, x, torch.ones(5)), 0, 1.6, 2, 1.6, 0)


@pytest.mark.parametrize(
    "make",
    [
        lambda: IRNet(1, (4,), gradient="soft"),
        lambda: IRNet(1, (4,), balance="yes"),
        lambda: IRNet(1, (4,), scale_by="max"),
        lambda: IRNet(1, (4,), tmin=20.0),
        lambda: IRNet(2, (4,)),
        lambda: ReCU(1, (4,), tau=0.5),
        lambda: ReCU(1, (4,), tau="auto"),
        lambda: AdaBinInput(1, (1, 4, 2, 2), granularity=PerChannel(1)),
        lambda: AdaBinInput(1, (4,), centre="mean"),
        lambda: AdaBinInput(1, (4,), range="zero"),
        lambda: RSign(1, (4,), gradient="none"),
        lambda: Sign(1, (4,), gradient="tanh"),
        lambda: Sign(1, (4,), normalize="sometimes"),
    ],
)
def test_what_is_not_allowed_is_refused_by_name(make):
    with pytest.raises(QexpError, match=r"(IRNet|ReCU|AdaBin\w+|RSign|Sign): .*allowed"):
        make()
