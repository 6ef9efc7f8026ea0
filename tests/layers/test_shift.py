"""Shift layers: published vectors, every convolution against float64, negative shifts counted, links to exponents."""

import pytest
import torch
from torch import nn

from qexp.errors import QexpError
from qexp.layers.shift import FAMILY, powers
from qexp.layers.swap import swap
from qexp.numerics.granularity import PerChannel
from qexp.quantizers.caq import CAQShift
from qexp.quantizers.uniform import Uniform


def exponents(values: list[int], ndim: int = 4) -> CAQShift:
    q = CAQShift(8, (1, len(values), *[1] * (ndim - 2)), granularity=PerChannel(1))
    q.set_exponents(torch.tensor(values))
    q.mark_ready()
    return q


def shift_layer(layer: nn.Module, qin: list[int], qout: list[int], **options) -> nn.Module:
    """Returns the layer computing by shifts, with exponents on its input and output."""
    ends = exponents(qin), exponents(qout)
    swap(layer, {"input": ends[0], "output": ends[1]}, {"_target_": FAMILY, **options})
    layer.link("layer", *ends)
    return layer.eval()


def point(weights: list[float]) -> nn.Conv2d:
    layer = nn.Conv2d(len(weights), 1, 1, bias=False)
    layer.weight.data = torch.tensor(weights).reshape(1, -1, 1, 1)
    return layer


def pixel(*values: float) -> torch.Tensor:
    return torch.tensor(values).reshape(1, -1, 1, 1)


def test_accumulator_and_result_as_published():
    layer, bn = point([0.26, 0.07, -0.55]), nn.BatchNorm2d(1, eps=1e-30).eval()  # 0 where it is added to 1
    bn.weight.data.fill_(0.9)
    bn.bias.data.fill_(-0.2)
    qin, qout = exponents([6, 7, 5]), exponents([4])
    swap(layer, {"input": qin}, {"_target_": FAMILY, "inflation": 15})
    swap(bn, {"output": qout})
    layer.eval().link("layer", qin, qout)
    x = pixel(1.1, -0.45, 2.7)
    _, shift = layer.shifts(layer.weight)
    assert qin.codes(x).flatten().tolist() == [70, -58, 86]
    assert powers(layer.weight)[1].flatten().tolist() == [-2, -4, -1] and shift.flatten().tolist() == [11, 8, 13]
    assert layer(x).item() * 2.0**19 == -576000
    assert qout.codes(bn(layer(x))).item() == -19 and bn(layer(x)).item() == -1.1875
    assert layer.account() == {"negative_shifts": 0, "accumulator_bits": 21}


@pytest.mark.parametrize("mode, code", [("exact", 1), ("legacy", 9), ("right_shift", 0), ("zero", 0)])
def test_negative_shifts_as_published(mode, code):
    layer = shift_layer(point([0.002, 0.25]), [13, 7], [2], inflation=4, negative_shift=mode)
    x = pixel(0.01, 0.5)
    assert layer.shifts(layer.weight)[1].flatten().tolist() == [-16, -3]
    assert layer.output_quantizer.codes(layer(x)).item() == code
    assert layer.account()["negative_shifts"] == 2


def test_right_shifts_floor_each_term():
    layer = shift_layer(point([0.25, 0.125]), [0, 0], [0], inflation=0, negative_shift="right_shift")
    assert layer(pixel(7.0, -9.0)).item() == 1 - 2, "7 >> 2 and -9 >> 3"
    layer = shift_layer(point([-0.25, 2.0]), [0, 0], [0], inflation=0, negative_shift="right_shift")
    assert layer(pixel(-7.0, 5.0)).item() == 2 + 10, "the sign comes after the shift"


KINDS = {
    "plain": {},
    "strided": {"stride": 2, "padding": 1},
    "grouped": {"groups": 2, "padding": 1},
    "depthwise": {"groups": 4, "padding": 1},
    "circular": {"padding": 1, "padding_mode": "circular"},
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_convolution_is_exact(kind):
    torch.manual_seed(0)
    float_layer = nn.Conv2d(4, 8, 3, **KINDS[kind])
    with torch.no_grad():
        float_layer.weight.copy_(torch.sign(float_layer.weight) * 2.0 ** torch.randint(-9, 1, float_layer.weight.shape))
    x = torch.randn(2, 4, 7, 7)
    layer = nn.Conv2d(4, 8, 3, **KINDS[kind])
    layer.load_state_dict(float_layer.state_dict())
    layer = shift_layer(layer, [3, 6, 2, 5], [4, 5, 6, 3, 4, 2, 7, 4])
    want = float_layer.double()(layer.input_quantizer(x).double())
    got = layer.compute(layer.input_quantizer(x), layer.weight, layer.bias)
    torch.testing.assert_close(got.double(), want, rtol=0, atol=1e-6)
    assert torch.equal(layer(x), layer.output_quantizer(want.float()))


def test_a_flattened_map_repeats_the_exponents_of_its_channels():
    torch.manual_seed(0)
    layer = nn.Linear(12, 3)
    with torch.no_grad():
        layer.weight.copy_(torch.sign(layer.weight) * 0.25)
    qin, qout = exponents([5, 3]), exponents([4, 4, 4], ndim=2)
    swap(layer, {"output": qout}, {"_target_": FAMILY})
    layer.eval().link("fc", qin, qout)
    x = qin(torch.randn(5, 2, 3, 2))
    want = qout(nn.functional.linear(x.flatten(1), layer.weight, layer.bias))
    assert torch.equal(layer(x.flatten(1)), want)


def test_general_weights_take_the_geometric_midpoint():
    sign, e = powers(torch.tensor([0.7, -1.45, 1.4, 1e-6]))
    assert e.tolist() == [-1, 1, 0, 0] and sign.tolist() == [1, -1, 1, 0]


def test_training_computes_with_the_weights_themselves():
    layer = shift_layer(point([0.3]), [4], [4]).train()
    layer(pixel(1.0)).sum().backward()
    assert layer.weight.grad is not None


def test_what_cannot_be_shifted_is_refused():
    with pytest.raises(QexpError, match="negative_shift='drop'; allowed are"):
        swap(nn.Linear(2, 2), {}, {"_target_": FAMILY, "negative_shift": "drop"})
    with pytest.raises(QexpError, match="conv1: a shift layer needs power-of-two exponents"):
        layer = point([0.5])
        swap(layer, {}, {"_target_": FAMILY})
        layer.link("conv1", Uniform(8), None)
    layer = point([0.5])
    swap(layer, {}, {"_target_": FAMILY})
    with pytest.raises(QexpError, match="before it was linked to the quantizers around it"):
        layer.eval()(pixel(1.0))


@pytest.mark.parametrize("bn", ["fold", "keep"])
def test_a_network_of_shifts_runs_and_reports(run, bn):
    metrics = run("quant=inq_shift", "bits=w4a8", f"bn={bn}")
    assert metrics["status"] == "ok", metrics["error"]
    assert metrics["negative_shifts"] == 0 and 12 < metrics["accumulator_bits"] < 40
    same = run("quant=inq_shift", "bits=w4a8", f"bn={bn}", "quant.compute=null")
    assert abs(metrics["value"] - same["value"]) <= 1.5, "shifting is another way to the same sums"
