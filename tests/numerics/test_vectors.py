"""Published vectors of rounding and of the error measures."""

import numpy as np
import pytest
import torch

from qexp.analysis.tensor_errors import tensor_errors
from qexp.numerics.granularity import PerChannel, PerGroup, PerTensor
from qexp.numerics.ops import dequantize, fake_quantize, quantize, round_to
from qexp.quantizers.base import Quantizer
from qexp.quantizers.uniform import Uniform
from qexp.statistics.stats import TensorStats

HALVES = (-2.5, -1.5, -0.5, 0.5, 1.5, 2.5)
ROUNDED = {
    "half_even": (-2, -2, 0, 0, 2, 2),
    "half_up": (-2, -1, 0, 1, 2, 3),
    "half_away": (-3, -2, -1, 1, 2, 3),
    "trunc": (-2, -1, 0, 0, 1, 2),
    "floor": (-3, -2, -1, 0, 1, 2),
}


@pytest.mark.parametrize("mode", ROUNDED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_ties_go_where_the_name_says(mode, dtype):
    assert round_to(torch.tensor(HALVES, dtype=dtype), mode).tolist() == list(ROUNDED[mode])


@pytest.mark.parametrize("mode", ["half_even", "half_up", "half_away"])
def test_just_below_a_half_stays_below(mode):
    below = torch.tensor([0.49999997, -0.49999997, 8388607.0])  # adding 0.5 in float32 would carry the first to 1
    assert round_to(below, mode).tolist() == [0, 0, 8388607]


def test_stochastic_rounding_is_unbiased_and_seeded():
    x = torch.full((20_000,), 2.3)
    generator = torch.Generator().manual_seed(1)
    y = round_to(x, "stochastic", generator)
    assert set(y.tolist()) == {2.0, 3.0} and abs(y.mean().item() - 2.3) < 0.01
    assert torch.equal(y, round_to(x, "stochastic", torch.Generator().manual_seed(1)))


def test_dequantize_undoes_quantize_on_the_grid():
    scale, zero = torch.tensor([0.5]), torch.tensor([3.0])
    x = (torch.arange(16) - 3) * 0.5
    codes = quantize(x, scale, zero, 0, 15)
    assert codes.tolist() == list(range(16)) and codes.dtype == torch.int32
    assert torch.equal(dequantize(codes, scale, zero), x)


def test_a_zero_point_beyond_the_grid_is_applied_before_rounding():
    """V1.1-c: an unclamped zero point, as gemmlowp's source form allows."""
    x, scale, zero = torch.tensor([2, 2.45, 3]), torch.tensor([1 / 15]), torch.tensor([-30.0])
    assert quantize(x, scale, zero, 0, 15).tolist() == [0, 7, 15]
    torch.testing.assert_close(fake_quantize(x, scale, zero, 0, 15), torch.tensor([2, 2.466667, 3]))


class Given(Quantizer):
    """Answers with codes and values that a test lays down."""

    def __init__(self, codes: list[float], scale: float) -> None:
        super().__init__(8)
        self.answer, self.scale = torch.tensor(codes), torch.tensor(scale)

    def codes(self, x):
        return self.answer


def test_error_measures():
    """V0.7-a, -b and -c."""
    x, y = torch.tensor([1, -0.5, 0.25, 2]), torch.tensor([1, -0.5, 0.5, 2])
    found = tensor_errors(Given([4, -2, 2, 8], 0.25), x, y)
    assert found["sqnr"] == pytest.approx(19.2941893, abs=1e-5)
    assert found["cosine"] == pytest.approx(0.9943692, abs=1e-6)
    assert found["mse"] == pytest.approx(0.0625 / 4)
    codes = torch.tensor([12.0, 24, -8])
    assert tensor_errors(Given(codes.tolist(), 1.0), torch.tensor([12.4, 23.1, -8.3]), codes)["norm1"] == pytest.approx(
        3.652968, abs=1e-5
    )
    counted = torch.tensor([0.0, 0, 1, 1, 2, 2, 2, 5])
    found = tensor_errors(Given(counted.tolist(), 1.0), counted, counted)
    assert found["entropy"] == pytest.approx(1.9056391, abs=1e-6)
    assert found["levels_used"] == 4 and found["sqnr"] == np.inf and found["saturation"] == 0


@pytest.mark.parametrize(
    ("granularity", "shape"),
    [(PerChannel(0), (3, 4)), (PerChannel(1), (4, 3)), (PerGroup(2), (2, 6)), (PerTensor(), (3, 4))],
)
def test_the_norm_1_error_is_that_of_codes(granularity, shape):
    """Groups whose scales lie far apart count by their codes: on values the widest would have all the say."""
    spread = torch.logspace(-2, 1, granularity.groups(shape)).reshape(granularity.scale_shape(shape))
    rows = shape if not isinstance(granularity, PerGroup) else (6, 2)
    x = (torch.rand(rows, generator=torch.Generator().manual_seed(0)) * spread).reshape(shape)
    quantizer = Uniform(4, shape, symmetric=False, granularity=granularity)
    quantizer.fit(TensorStats.of(x, granularity))
    exact = (x.reshape(rows) / quantizer.scale).double()
    codes = quantizer.codes(x).reshape(rows) - quantizer.zero_point
    wanted = 100 * float((codes - exact).abs().sum() / exact.abs().sum())
    assert tensor_errors(quantizer, x)["norm1"] == pytest.approx(wanted, rel=1e-4)


def test_saturation_counts_what_lies_beyond_the_outermost_levels():
    x, y = torch.tensor([0.2, 1.0, 3.0, 5.0]), torch.tensor([0.0, 1.0, 2.0, 2.0])
    assert tensor_errors(Given([0, 1, 2, 2], 1.0), x, y)["saturation"] == 50
