"""Fixed point: published vectors, one bit, the formats of weights and results, and what stays float."""

import pytest
import torch

from qexp.errors import QexpError
from qexp.quantizers.fixed_point import FixedPoint
from qexp.ranges import MinMax, PowerOfTwo
from qexp.ranges.power_of_two import integer_bits
from qexp.run.settings import read
from qexp.statistics.stats import TensorStats


def fitted(x: torch.Tensor, bits: int, **options) -> FixedPoint:
    q = FixedPoint(bits, tuple(x.shape), **options)
    q.fit(TensorStats.of(x, q.granularity))
    return q


@pytest.mark.parametrize("edge", ["bump", "legacy"])
@pytest.mark.parametrize(
    "magnitude, sf", [(0.24, -2), (0.3, -1), (0.5, 0), (1.0, 1), (2, 2), (3.7, 2), (127, 7), (0, -39)]
)
def test_integer_bits_as_published(magnitude, sf, edge):
    assert integer_bits(torch.tensor([magnitude]), edge).item() == sf


def test_edges_differ_at_powers_of_two_alone():
    exponents = range(-38, 20)
    powers = torch.tensor([2.0**k for k in exponents], dtype=torch.float64)
    assert integer_bits(powers, "bump").tolist() == [k + 1 for k in exponents]
    assert integer_bits(powers, "tight").tolist() == list(exponents)
    assert integer_bits(powers, "legacy").tolist() == [k + 1 if k <= 10 else k for k in exponents]
    for edge in ("bump", "tight", "legacy"):
        assert integer_bits(powers * 1.25, edge).tolist() == [k + 1 for k in exponents]


def test_codes_and_values_as_published():
    x = torch.tensor([0.1, -0.7, 1, 1.3, -1.3, 2.5, -2.5])
    q = FixedPoint(8, (7,))
    q.fit(TensorStats.of(torch.tensor([1.9])))
    assert q.integer_bits == 1 and q.fraction_bits == 6
    assert q.codes(x).tolist() == [6, -45, 64, 83, -83, 127, -128]
    assert q(x).tolist() == [0.09375, -0.703125, 1, 1.296875, -1.296875, 1.984375, -2]


@pytest.mark.parametrize("rounding, codes", [("half_even", [0, 2, 2, 0]), ("half_up", [1, 2, 3, 0])])
def test_ties_as_published(rounding, codes):
    q = fitted(torch.tensor([100.0]), 8, rounding=rounding)
    assert q.codes(torch.tensor([0.5, 1.5, 2.5, -0.5]) * q.scale).tolist() == codes


@pytest.mark.parametrize("bits, low", [(2, -8), (5, 2), (16, -30), (8, 20)])
def test_fraction_bits_may_be_negative_or_above_the_width(bits, low):
    q = fitted(torch.tensor([0.9 * 2.0**low]), bits)
    assert q.integer_bits == low and q.fraction_bits == bits - 1 - low
    assert q.scale.item() == 2.0 ** (low - bits + 1) and q.levels == 2**bits


def test_one_bit_is_a_sign_and_zero_is_positive():
    q = fitted(torch.tensor([-1.5, 0.2]), 1)
    x = torch.tensor([-3.0, -1e-30, -0.0, 0.0, 1e-30, 2.0], requires_grad=True)
    y = q(x)
    assert y.tolist() == [-2, -2, 2, 2, 2, 2] and q.levels == 2 and q.integer_bits == 1
    assert torch.equal(q.dequantize(q.codes(x)), y)
    y.sum().backward()
    assert x.grad.tolist() == [0, 1, 1, 1, 1, 1], "the gradient passes within [-2^sf, 2^sf]"
    assert q(torch.tensor([torch.nan])).isnan().all()


def test_gradient_is_one_inside_and_at_the_limits():
    q = fitted(torch.tensor([0.9]), 3)
    x = torch.tensor([-1.01, -1.0, -0.3, 0.0, 0.75, 0.76], requires_grad=True)
    q(x).sum().backward()
    assert x.grad.tolist() == [0, 1, 1, 1, 1, 0]


def test_what_a_relu_drops_costs_no_bit_where_it_does_not_count():
    stats = TensorStats.of(torch.tensor([-9.0, 0.5, 3.0]))
    for options, relu, bits in (
        ({}, True, 4),
        ({"before_relu": "positive"}, True, 2),
        ({"before_relu": "positive"}, False, 4),
    ):
        q = FixedPoint(8, (3,), range=PowerOfTwo(**options))
        q.fit(stats, followed_by_relu=relu)
        assert q.integer_bits == bits


def test_overflow_rate_lets_the_greatest_saturate():
    x = torch.arange(1, 1001) / 100.0
    assert fitted(x, 8, range=PowerOfTwo(overflow_rate=0.0)).integer_bits == 4
    assert fitted(x, 8, range=PowerOfTwo(overflow_rate=0.3)).integer_bits == 3
    low, high = PowerOfTwo(overflow_rate=0.3)(TensorStats.of(x), None, None)
    assert (low.item(), high.item()) == (-8, 8), "the 300th greatest is 7.00"


def test_the_format_comes_back_from_a_checkpoint():
    q, fresh = fitted(torch.tensor([5.0]), 8), FixedPoint(8, (1,))
    fresh.load_state_dict(q.state_dict())
    assert fresh.fraction_bits == q.fraction_bits == 4


@pytest.mark.parametrize(
    "options", [{"overflow_rate": 0.5}, {"overflow_rate": -0.1}, {"pow2_edge": "round"}, {"before_relu": "no"}]
)
def test_bad_ranges_are_refused(options):
    with pytest.raises(QexpError, match="allowed"):
        PowerOfTwo(**options)


def test_a_range_that_ends_elsewhere_is_refused():
    with pytest.raises(QexpError, match="power of two"):
        fitted(torch.tensor([0.9]), 8, range=MinMax())


def test_batch_norm_bits_are_honoured_and_counters_untouched(run, compose, digits):
    from qexp.run.pipeline import recipe

    plan_bits = recipe(read(compose(*digits, "quant=fixed_point", "bits=fx12", "quant.bn_bits=6"))).rules["bn"]
    assert {plan_bits[s]["bits"] for s in ("weight", "bias", "running_mean", "running_var")} == {6}
    fine = run("quant=fixed_point", "bits=fx12", "bn=keep")
    coarse = run("quant=fixed_point", "bits=fx12", "bn=keep", "quant.bn_bits=2")
    assert fine["status"] == coarse["status"] == "ok"
    assert fine["value"] > coarse["value"] + 20, "two bits for a batch norm cannot go unnoticed"


def test_widths_of_32_stay_float(run):
    metrics = run("quant=fixed_point", "layer_wbit=32", "layer_abit=32")
    assert metrics["value"] == metrics["value_float"] and metrics["quantized_layers"] == 0


@pytest.mark.parametrize(
    "name, bn", [("fixed_point", "keep"), ("fixed_point_per_op", "fold"), ("sources/imagenet_cnn_quantization", "keep")]
)
def test_more_bits_are_nearer_to_float(run, name, bn):
    eight, sixteen = (run(f"quant={name}", f"bits=fx{b}", f"bn={bn}") for b in (8, 16))
    assert sixteen["status"] == "ok" and abs(sixteen["drop"]) <= 0.5
    assert eight["worst_sqnr"] < sixteen["worst_sqnr"] - 20


def test_placements_say_what_stays_float(run):
    full, source = (run(f"quant={n}", "bits=fx12") for n in ("fixed_point", "sources/imagenet_cnn_quantization"))
    assert full["left_float"] == ["conv1.input"] and full["add"] == "quantized"
    assert {"add", "pool2", "conv4.input", "fc.input"} <= set(source["left_float"]) and source["add"] == "float"


def test_the_source_placement_quantizes_results_inside_a_sequential(compose):
    from torch import nn

    from qexp.network.facts import facts
    from qexp.recipe import resolve
    from qexp.run.pipeline import recipe

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.features = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.AvgPool2d(2))
            self.bn = nn.BatchNorm2d(4)
            self.classifier = nn.Sequential(nn.Flatten(), nn.Linear(36, 5))
            self.fc = nn.Linear(5, 3)

        def forward(self, x):
            return self.fc(self.classifier(self.bn(self.features(x))))

    net, images = Net().eval(), torch.zeros(1, 1, 8, 8)
    asked = recipe(
        read(compose("quant=sources/imagenet_cnn_quantization", "bits=fx8", "model.first=null", "model.last=null"))
    )
    plan = resolve(net, facts(net, images), asked)
    outputs = {e.layer for e in plan if e.site == "output" and e.spec}
    assert outputs == {"features.0", "features.1", "features.3", "classifier.1"}
    assert {e.layer for e in plan if e.site == "compute" and e.spec} == {"features.0"}, (
        "a linear layer's sum is rounded once"
    )
    assert {e.layer for e in plan if e.site == "running_var" and e.spec} == {"features.1", "bn"}


def test_the_source_rounds_the_finished_sum_of_a_linear_layer(compose):
    from torch import nn

    from qexp.calibration.calibrate import calibrate
    from qexp.network.facts import facts
    from qexp.recipe import apply, resolve
    from qexp.run.pipeline import recipe

    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 5)).eval()
    images = torch.randn(8, 1, 8, 8)
    structure = facts(net, images)
    asked = recipe(
        read(compose("quant=sources/imagenet_cnn_quantization", "bits=fx8", "model.first=null", "model.last=null"))
    )
    apply(net, resolve(net, structure, asked), structure)
    calibrate(net, [images], progress=False)
    seen = {}
    net[3].register_forward_hook(lambda layer, args, y: seen.update(x=args[0], y=y))
    net(images)
    layer, q = net[3], net[3].output_quantizer
    once = q(seen["x"] @ layer.quantized_weight().T + layer.quantized_bias())
    products = q(layer.quantized_weight()[None] * seen["x"][:, None])
    assert torch.equal(seen["y"], once)
    assert not torch.equal(seen["y"], q(q(products.sum(2)) + layer.quantized_bias())), "which would lose small products"


@pytest.mark.parametrize("name", ["sources/imagenet_cnn_quantization", "mpact_integer_bn"])
def test_a_recipe_that_needs_batch_norms_keeps_them(run, compose, name):
    metrics = run(f"quant={name}", "schedule=ptq", "bits=fx12")
    assert metrics["status"] == "ok" and metrics["bn"] == "keep"
    assert compose(f"quant={name}", "schedule=ptq", "bn=fold").bn == "fold", "an explicit setting wins"
    assert compose(f"quant={name}", "schedule=ptq", "schedule.bn=fold").bn == "fold"
    assert compose("quant=fixed_point", "schedule=ptq").bn == "fold"


@pytest.mark.parametrize("model", ["toynet", "mobilenetv2", "resnet20"])
@pytest.mark.parametrize("method", ["dorefa", "pact", "mpact"])
def test_placements_of_pact_quantization_keep_batch_norms(compose, model, method):
    assert compose(f"model={model}", f"quant=placed/{model}/{method}", "schedule=ptq").bn == "keep"
