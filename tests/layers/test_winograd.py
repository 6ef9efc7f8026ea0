"""Winograd layers: exact without the clamp, overflows counted with it, large strided kernels as 3x3 ones."""

import pytest
import torch
import torch.nn.functional as F
from qexp_kernels.winograd import MATRICES
from torch import nn

from qexp.calibration.site_stats import SiteStats
from qexp.errors import QexpError
from qexp.layers.swap import swap
from qexp.layers.winograd import FAMILY, phases
from qexp.numerics.granularity import PerChannel
from qexp.quantizers.caq import CAQSimple
from qexp.quantizers.uniform import Uniform
from qexp.statistics.stats import TensorStats


def winograd_layer(layer: nn.Module, x: torch.Tensor, **options) -> nn.Module:
    """Returns the layer on 8-bit codes of `x` and of its weight, one scale each."""
    qx, qw = CAQSimple(8, (1, *x.shape[1:])), Uniform(8, tuple(layer.weight.shape), signed=True, narrow=True)
    seen = SiteStats()
    seen.update(x)
    qx.fit(seen.tensor)
    qw.fit(TensorStats.of(layer.weight))
    swap(layer, {"input": qx, "weight": qw}, {"_target_": FAMILY, **options})
    return layer.eval()


def direct(layer: nn.Conv2d, x: torch.Tensor) -> torch.Tensor:
    """Returns the layer's result by the ordinary convolution of its integer codes, float64."""
    qx, qw = layer.input_quantizer, layer.weight_quantizer
    plain = nn.Conv2d(
        layer.in_channels,
        layer.out_channels,
        layer.kernel_size,
        layer.stride,
        layer.padding,
        layer.dilation,
        layer.groups,
        False,
        layer.padding_mode,
    ).double()
    plain.weight.data = qw.codes(layer.weight).double()
    y = plain(qx.codes(x).double()).detach() * (qx.scale.double() * qw.scale.double())
    return y if layer.bias is None else y + layer.bias.detach().double()[:, None, None]


KINDS = {
    "3x3": (3, {"padding": 1}),
    "3x3 unpadded": (3, {}),
    "3x3 strided": (3, {"stride": 2, "padding": 1}),
    "5x5 strided": (5, {"stride": 2, "padding": 2}),
    "7x7 strided": (7, {"stride": 2, "padding": 3}),
    "9x9 strided": (9, {"stride": 2, "padding": 4}),
    "3x3 circular": (3, {"padding": 1, "padding_mode": "circular"}),
    "1x1": (1, {}),
    "depthwise": (3, {"groups": 4, "padding": 1}),
    "dilated": (3, {"dilation": 2}),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("outputs, two_d", [(2, False), (4, True), (5, False)])
def test_without_the_clamp_every_convolution_is_the_direct_one(kind, outputs, two_d):
    torch.manual_seed(0)
    size, options = KINDS[kind]
    x, layer = torch.randn(2, 4, 12, 11), nn.Conv2d(4, 8, size, **options)
    layer = winograd_layer(layer, x, outputs=outputs, two_d=two_d, clamp_int16=False)
    assert torch.equal(layer(x), direct(layer, x).float())
    assert sum(layer.account().values()) == 0


def test_a_linear_layer_is_exact_too():
    torch.manual_seed(0)
    x, layer = torch.randn(3, 20), nn.Linear(20, 4)
    layer = winograd_layer(layer, x)
    codes = layer.input_quantizer.codes(x).double() @ layer.weight_quantizer.codes(layer.weight).double().T
    scale = layer.input_quantizer.scale.double() * layer.weight_quantizer.scale.double()
    assert torch.equal(layer(x), (codes * scale + layer.bias.double()).float())


@pytest.mark.parametrize(
    "outputs, two_d, lossless", [(2, False, 1), (4, False, 1), (5, False, 1), (2, True, 1), (4, True, 0), (5, True, 0)]
)
def test_16_bits_hold_the_transforms_they_should(outputs, two_d, lossless):
    """Weights and inputs at both ends of their range, in the signs that the transforms add up worst."""
    g = torch.Generator().manual_seed(0)
    x = 2.0 * torch.randint(0, 2, (2, 2, 20, 20), generator=g) - 1
    layer = nn.Conv2d(2, 16, 3, padding=1, bias=False)
    layer.weight.data = 2.0 * torch.randint(0, 2, layer.weight.shape, generator=g) - 1
    layer = winograd_layer(layer, x, outputs=outputs, two_d=two_d, clamp_int16=True)
    y, overflows = layer(x), sum(layer.account().values())
    assert (overflows == 0) == bool(lossless) == torch.equal(y, direct(layer, x).float())


@pytest.mark.parametrize("outputs", MATRICES)
def test_ranges_of_the_transforms(outputs):
    m = MATRICES[outputs]
    rows = [max(sum(map(abs, row)) for row in matrix) for matrix in (m.bt, m.g, m.at)]
    assert rows == {2: [2, 3, 3], 4: [10, 24, 19], 5: [40, 120, 116]}[outputs]


VECTORS = [
    (2, (-2, 5, 1, 2), (2, 6, 2, 6), (28, 40)),
    (4, (-6, -11, -3, 6, -2, -6), (6, -24, -8, 17, 9, 72), (336, 480, 624, 768)),
]


@pytest.mark.parametrize("outputs, v, u, y", VECTORS)
def test_transforms_as_published(outputs, v, u, y):
    m = MATRICES[outputs]
    bt, g, at = (torch.tensor(matrix) for matrix in (m.bt, m.g, m.at))
    got_v, got_u = bt @ torch.arange(1, outputs + 3), g @ torch.tensor([1, 2, 3])
    assert got_v.tolist() == list(v) and got_u.tolist() == list(u)
    assert (at @ (got_v * got_u)).tolist() == list(y)


@pytest.mark.parametrize("k, pieces", [(3, 4), (5, 4), (7, 9), (9, 16), (11, 16)])
@pytest.mark.parametrize("size", [(23, 23), (30, 17), (11, 12)])
def test_strided_kernels_become_3x3_ones(k, pieces, size):
    g = torch.Generator().manual_seed(k)
    x = torch.randint(-128, 128, (2, 3, *size), generator=g)
    w = torch.randint(-127, 128, (4, 3, k, k), generator=g)
    xs, ws = phases(x, w)
    assert ws.shape == (4, 3 * pieces, 3, 3)
    got = F.conv2d(xs.double(), ws.double())
    assert torch.equal(got, F.conv2d(x.double(), w.double(), stride=2))
    assert ws.abs().sum() == w.abs().sum(), "each tap once"
    real = torch.randn(2, 3, *size, dtype=torch.float64, generator=g)
    kernel = torch.randn(4, 3, k, k, dtype=torch.float64, generator=g)
    torch.testing.assert_close(F.conv2d(*phases(real, kernel)), F.conv2d(real, kernel, stride=2), rtol=0, atol=1e-12)


def test_the_first_layer_of_an_imagenet_network_has_the_published_sizes():
    xs, ws = phases(torch.zeros(1, 3, 230, 230), torch.zeros(8, 3, 7, 7))
    assert xs.shape == (1, 27, 114, 114) and ws.shape == (8, 27, 3, 3)
    assert F.conv2d(xs, ws).shape[2:] == (112, 112)


def test_gradients_flow_in_training():
    x = torch.randn(2, 4, 6, 6)
    layer = winograd_layer(nn.Conv2d(4, 4, 3), x).train()
    layer(x).sum().backward()
    assert layer.weight.grad.abs().sum() > 0


def test_what_cannot_be_summed_is_refused():
    per_channel = CAQSimple(8, (1, 4, 6, 6), granularity=PerChannel(1))
    weight = Uniform(8, (4, 4, 3, 3), signed=True)
    for sites in ({"input": per_channel, "weight": weight}, {"weight": weight}, {"input": CAQSimple(8)}):
        with pytest.raises(QexpError, match="one scale"):
            swap(nn.Conv2d(4, 4, 3), sites, {"_target_": FAMILY})
    with pytest.raises(QexpError, match="outputs=3; allowed are 2, 4, 5"):
        swap(nn.Conv2d(4, 4, 3), {"input": CAQSimple(8), "weight": weight}, {"_target_": FAMILY, "outputs": 3})


@pytest.mark.parametrize("bn", ["fold", "keep"])
def test_a_network_runs_and_reports_its_overflows(run, bn):
    kept = run("quant=caq_winograd", f"bn={bn}", "max_samples=50")
    assert kept["status"] == "ok", kept["error"]
    assert kept["winograd_weight_overflows"] == kept["winograd_input_overflows"] == 0
    plain = run("quant=caq_winograd", f"bn={bn}", "max_samples=50", "quant.compute=null")
    assert kept["value"] == plain["value"]


def test_two_dimensions_overflow_and_say_so(run, caplog):
    with caplog.at_level("WARNING"):
        metrics = run("quant=caq_winograd", "quant.compute.two_d=true", "quant.compute.outputs=5", "max_samples=50")
    assert "16 bits do not hold" in caplog.text
    assert metrics["winograd_weight_overflows"] > 0
