"""Corrected means and spreads of weights: the vectors, and what a network's weights become."""

import pytest
import torch

from qexp.calibration.calibrate import calibrate
from qexp.errors import QexpError
from qexp.layers.swap import bake, swap
from qexp.network.facts import Facts, facts
from qexp.numerics import PerChannel
from qexp.passes.base import PassContext
from qexp.passes.weight_correction import FORMS, WeightCorrection
from qexp.quantizers.dorefa import DoReFaWeight
from qexp.quantizers.gemmlowp import GEMMLOWP
from qexp.ranges import Clip
from qexp.statistics.stats import TensorStats

W = torch.tensor([[0.9, -0.31, 0.12, 0.47, -1, 0.05]])
EXPECTED = {
    "mean": (0.882778, -0.257222, 0.122778, 0.502778, -1.017222, -0.003889),
    "var": (0.885842, -0.253045, 0.126584, 0.506213, -1.012302, 0.000041),  # var_mean's, off by the shift of the mean
    "paper": (0.881916, -0.256971, 0.122658, 0.502287, -1.016229, -0.003885),
    "var_mean": (0.881953, -0.256934, 0.122695, 0.502324, -1.016191, -0.003848),
}


@pytest.mark.parametrize("form", FORMS)
def test_the_vectors(form):
    """V2.2-a, V2.2-b."""
    q = GEMMLOWP(4, (1, 6), granularity=PerChannel(0))
    q.fit(TensorStats.of(W, PerChannel(0)))
    assert q.scale.item() == pytest.approx(0.1266667, abs=1e-7) and q.zero_point.item() == 8
    assert q.codes(W).tolist() == [[15, 6, 9, 12, 0, 8]]
    gain, offset = FORMS[form](W.double(), q(W).double())
    found = gain[:, None] * q(W).double() + offset[:, None]
    assert found[0].tolist() == pytest.approx(EXPECTED[form], abs=1e-6)


def test_means_and_xi_of_the_vector():
    q = GEMMLOWP(4, (1, 6), granularity=PerChannel(0))
    q.fit(TensorStats.of(W, PerChannel(0)))
    assert W.mean().item() == pytest.approx(0.0383333, abs=1e-6) and q(W).mean().item() == pytest.approx(
        0.0422222, abs=1e-6
    )
    xi, shift = FORMS["paper"](W.double(), q(W).double())
    assert xi.item() == pytest.approx(0.9990235, abs=1e-6) and (shift / xi).item() == pytest.approx(
        -0.0038889, abs=1e-6
    )


def network(bits: int = 4) -> tuple[torch.nn.Sequential, Facts, PassContext]:
    torch.manual_seed(0)
    net = torch.nn.Sequential(
        torch.nn.Conv2d(3, 8, 3),
        torch.nn.ReLU(),
        torch.nn.ConvTranspose2d(8, 4, 2),
        torch.nn.Flatten(),
        torch.nn.Linear(196, 5),
    ).eval()
    with torch.no_grad():
        net[0].weight[1] = 0.3
        net[4].weight[2] = 0
    structure = facts(net, torch.zeros(1, 3, 8, 8))
    for layer, axis in ((net[2], 1), (net[4], 0)):
        swap(layer, {"weight": GEMMLOWP(bits, tuple(layer.weight.shape), granularity=PerChannel(axis))})
    swap(
        net[0],
        {
            "weight": GEMMLOWP(bits, (8, 3, 3, 3), granularity=PerChannel(0)),
            "output": GEMMLOWP(2, (1, 8, 6, 6), granularity=PerChannel(1), range=Clip("none")),
        },
    )
    images = [torch.randn(8, 3, 8, 8)]
    context = PassContext(structure, images, {})
    calibrate(net, images, followed_by_relu=structure.followed_by_relu, progress=False)
    return net, structure, context


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("bits", [1, 2, 4])
def test_every_output_channel_has_its_mean_back(form, bits):
    net, _, context = network(bits)
    codes = net[0].weight_quantizer.codes(net[0].weight)
    before = [layer.quantized_weight().detach().double() for layer in (net[0], net[2], net[4])]
    WeightCorrection(form).on_fitted(net, context)
    assert context.findings["corrected_weights"] == 3
    for layer, axis, uncorrected in zip((net[0], net[2], net[4]), (0, 1, 0), before):
        w, q = (t.detach().double().movedim(axis, 0).flatten(1) for t in (layer.weight, layer.quantized_weight()))
        assert torch.isfinite(q).all()
        wanted = uncorrected.movedim(axis, 0).flatten(1).mean(1) if form == "var" else w.mean(1)
        if form == "paper":
            wanted = wanted * layer.weight_quantizer.gain.double().flatten()
        torch.testing.assert_close(q.mean(1), wanted, atol=1e-6, rtol=1e-5)
        if form != "mean":
            flat = q.std(1) == 0
            torch.testing.assert_close(q.std(1)[~flat], w.std(1)[~flat], atol=1e-6, rtol=1e-4)
    assert torch.equal(net[0].weight_quantizer.codes(net[0].weight), codes), "codes stay"
    torch.testing.assert_close(net[0].quantized_weight()[1], net[0].weight[1], atol=1e-6, rtol=0)


def test_the_layer_computes_gain_and_offset_as_an_epilogue_would():
    net, _, context = network()
    conv, x = net[0], torch.randn(2, 3, 8, 8)
    plain = torch.nn.functional.conv2d(x, conv.quantized_weight())
    WeightCorrection("var_mean").on_fitted(net, context)
    q = conv.weight_quantizer
    sums = torch.nn.functional.conv2d(x, torch.ones(1, 3, 3, 3))
    expected = plain * q.gain.reshape(1, -1, 1, 1) + sums * q.offset.reshape(1, -1, 1, 1)
    torch.testing.assert_close(torch.nn.functional.conv2d(x, conv.quantized_weight()), expected, atol=1e-5, rtol=1e-5)


def test_it_survives_saving_and_baking():
    net, _, context = network()
    WeightCorrection().on_fitted(net, context)
    fresh, _, _ = network()
    fresh.load_state_dict(net.state_dict())
    x = torch.randn(2, 3, 8, 8)
    assert torch.equal(fresh(x), net(x))
    weight = net[4].quantized_weight()
    bake(net[4])
    assert torch.equal(net[4].weight, weight)


def test_twice_and_none_are_refused():
    net, structure, context = network()
    WeightCorrection().on_fitted(net, context)
    with pytest.raises(QexpError, match="corrected twice"):
        WeightCorrection().on_fitted(net, context)
    plain = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3))
    with pytest.raises(QexpError, match="no layer has a quantized weight"):
        WeightCorrection().on_fitted(plain, PassContext(structure, [], {}))
    with pytest.raises(QexpError, match="form="):
        WeightCorrection("median")


def test_a_method_that_cannot_carry_it_says_so():
    layer = torch.nn.Conv2d(3, 8, 3)
    net = torch.nn.Sequential(layer)
    structure = facts(net, torch.zeros(1, 3, 8, 8))
    swap(layer, {"weight": DoReFaWeight(4, (8, 3, 3, 3))})
    with pytest.raises(QexpError, match="DoReFaWeight cannot carry a correction"):
        WeightCorrection().on_fitted(net, PassContext(structure, [], {}))
