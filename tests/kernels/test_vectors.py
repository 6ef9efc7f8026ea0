"""Published vectors, on every implementation."""

import pytest
import qexp_kernels as kernels
import torch
from qexp_kernels.regrid import Step
from torch import tensor

DOREFA = [-1.5, -0.6, -0.2, 0, 0.05, 0.3, 0.9, 1.2]
PACT = [-12.0, -3.2, -0.2, 0.4, 0.65, 1.7, 5.1, 9]
RANGE = [-1, -0.4, 0, 0.25, 0.55, 2]


@pytest.fixture
def t(device, implementation):
    """Makes a float64 tensor on the device (the vectors are stated in float64)."""
    return lambda *values: tensor(values, dtype=torch.float64, device=device)


def close(got, *want):
    torch.testing.assert_close(got.detach().cpu().flatten(), tensor(want, dtype=got.dtype), rtol=0, atol=2e-6)


@pytest.mark.parametrize(
    "rounding, want",
    [
        ("half_even", (-2, -2, 0, 0, 2, 2)),
        ("half_up", (-2, -1, 0, 1, 2, 3)),
        ("half_away", (-3, -2, -1, 1, 2, 3)),
        ("trunc", (-2, -1, 0, 0, 1, 2)),
        ("floor", (-3, -2, -1, 0, 1, 2)),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_rounding_of_ties(t, rounding, want, dtype):
    x = t(-2.5, -1.5, -0.5, 0.5, 1.5, 2.5).to(dtype)
    close(kernels.round_to(x, rounding), *want)


@pytest.mark.parametrize("rounding", ["half_up", "half_away", "half_even"])
def test_the_number_below_a_half_rounds_to_zero_in_float32(t, rounding):
    below = torch.nextafter(tensor(0.5), tensor(0.0)).to(t(0).device)
    assert below < 0.5 and kernels.round_to(below, rounding) == 0 and kernels.round_to(-below, rounding) == 0


def test_stochastic_rounding_is_floor_of_x_plus_u(t):
    x = t(*torch.linspace(-3, 3, 101).tolist()).to(torch.float32)
    got = kernels.round_to(x, "stochastic", torch.Generator(x.device).manual_seed(7))
    u = torch.empty_like(x).uniform_(0, 1, generator=torch.Generator(x.device).manual_seed(7))
    assert torch.equal(got, torch.floor(x.double() + u.double()).float())


def test_stochastic_rounding_is_unbiased_and_keeps_integers(t):
    x = torch.full((200_000,), 0.3, device=t(0).device)
    assert kernels.round_to(x, "stochastic", torch.Generator(x.device).manual_seed(0)).mean().item() == pytest.approx(
        0.3, abs=0.004
    )
    assert torch.equal(kernels.round_to(x * 0 + 5, "stochastic"), x * 0 + 5)


def test_lsq_signed(t):
    x, s = t(-1.2, -0.4, 0.1, 0.35, 0.9, 2).requires_grad_(), t(0.25).requires_grad_()
    y = kernels.lsq(x, s, -4, 3, grad_scale=(6 * 3) ** -0.5)
    close(y / 0.25, -4, -2, 0, 1, 3, 3)
    y.sum().backward()
    close(x.grad, 0, 1, 1, 1, 0, 0)
    close(s.grad, 0.1885618)


def test_lsq_unsigned_by_channel_gives_each_term(t):
    x, s = t(0, 0.24, 0.55, 0.9, 1.4, 3.2).requires_grad_(), t(*[0.4] * 6).requires_grad_()
    y = kernels.lsq(x, s, 0, 3, axis=0)
    close(y / 0.4, 0, 1, 1, 2, 3, 3)
    y.sum().backward()
    close(x.grad, 0, 1, 1, 1, 0, 0)
    close(s.grad, 0, 0.4, -0.375, -0.25, 3, 3)


def test_lsq_plus(t):
    x = t(-0.5, 0.05, 0.8, 0.3, 2.2).requires_grad_()
    s, beta = t(*[0.3] * 5).requires_grad_(), t(*[-0.2] * 5).requires_grad_()
    y = kernels.lsq(x, s, 0, 3, axis=0, offset=beta)
    close(y, -0.2, 0.1, 0.7, 0.4, 0.7)
    y.sum().backward()
    close(s.grad, 0, 0.1666667, 3, 0.3333333, 3)
    close(beta.grad, 1, 0, 1, 0, 1)
    close(x.grad, 0, 1, 0, 1, 0)


def test_pact(t):
    close(kernels.pact(t(*PACT), t(6), 15), 0, 0, 0, 0.4, 0.8, 1.6, 5.2, 6)
    x, alpha = t(-12, -3, -0.2, 0, 0.4, 0.6, 1.7, 5, 5.99, 6, 9, 10, 11).requires_grad_(), t(6).requires_grad_()
    kernels.pact(x, alpha, 15).sum().backward()
    close(alpha.grad, 4)
    close(x.grad, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0)


def test_mpact(t):
    want = -6, -3.428571, 0, 0, 0.857143, 1.714286, 5.142857, 6
    close(kernels.mpact(t(*PACT), t(6), 7), *want)
    close(kernels.mpact(t(*PACT), t(-6), 7), *want)
    for sign in (1, -1):
        x, alpha = t(-7, -6, -1, 0, 6, 7, 8).requires_grad_(), t(6 * sign).requires_grad_()
        kernels.mpact(x, alpha, 7).sum().backward()
        close(x.grad, 0, 1, 1, 1, 1, 0, 0)
        close(alpha.grad, sign * (3 - 2))


def test_dorefa(t):
    w = t(*DOREFA)
    close(kernels.dorefa_weight(w, 15), -1, -0.6, -0.2, 0.066667, 0.066667, 0.333333, 0.733333, 0.866667)
    close(kernels.dorefa_weight(w, 7, True), -1, -0.571429, -0.285714, 0, 0, 0.285714, 0.857143, 0.857143)
    close(kernels.dorefa_weight(w, 1, True), -1, -1, 0, 0, 0, 0, 1, 1)


def test_gemmlowp(t):
    zero = t(0)
    close(kernels.gemmlowp(t(*RANGE), t(0.2), t(5), zero, 0, 15), -1, -0.4, 0, 0.2, 0.6, 2)
    close(kernels.gemmlowp(t(*RANGE), t(0.25), t(4), zero, 0, 15), -1, -0.5, 0, 0.25, 0.5, 2)
    close(kernels.gemmlowp(t(2, 2.45, 3), t(1 / 15), t(-30), zero, 0, 15), 2, 2.466667, 3)
    close(kernels.gemmlowp(t(0.37, 0.9, 1.6), t(1.23 / 7), zero, t(0.37), 0, 7), 0.37, 0.8971429, 1.6)
    assert kernels.gemmlowp_codes(t(0.37, 0.9, 1.6), t(1.23 / 7), zero, t(0.37), 0, 7).tolist() == [0, 3, 7]


def test_gemmlowp_adds_the_zero_point_before_rounding(t):
    x, grid = t(0.25, 0.75, 1.25, -0.25), (t(0.5), t(3), t(0), 0, 15)
    close(kernels.gemmlowp(x, *grid) / 0.5 + 3, 4, 4, 6, 2)
    close(kernels.gemmlowp(x, *grid, rounding="half_away") / 0.5 + 3, 4, 5, 6, 3)
    assert kernels.quantize(x, t(0.5), t(3), 0, 15).tolist() == [4, 4, 6, 2]


def test_gemmlowp_adds_its_noise_to_the_code_and_clips_afterwards(t):
    x = t(0.0).expand(20_000)
    grid = t(0.5), t(3), t(0), 0, 3
    codes = kernels.gemmlowp_codes(x + 0.1, *grid, noise="uniform", generator=torch.Generator(x.device).manual_seed(0))
    share = [(codes == code).float().mean().item() for code in (2, 3, 4)]
    assert (
        share[0] == 0 and share[1] == 1
    )  # 3.2 is beyond the clip with any noise that would take it to 4, never below 2.7
    codes = kernels.gemmlowp_codes(x - 0.4, *grid, noise="uniform", generator=torch.Generator(x.device).manual_seed(0))
    assert abs((codes == 2).float().mean().item() - 0.8) < 0.02 and (codes == 3).float().mean().item() < 0.22


def test_codes_at_the_end_of_int32_saturate(t):
    for function in (kernels.quantize, lambda x, s, z, low, high: kernels.gemmlowp_codes(x, s, z, t(0), low, high)):
        for low, high in ((-7, 2**31 - 1), (t(-7.0), t(2.0**31))):
            codes = function(t(3e9, 1e20, -3e9, float("inf"), float("nan"), 5), t(1), t(0), low, high).tolist()
            assert codes == [2**31 - 1, 2**31 - 1, -7, 2**31 - 1, -(2**31), 5]


def test_level_grid_apot(t):
    positive = t(0, 0.1, 0.2, 0.3, 0.4, 0.6, 0.8, 1)
    levels = torch.cat([-positive.flip(0)[:-1], positive])
    x, alpha = t(-2, -0.9, -0.33, 0, 0.1, 0.52, 1.05, 1.4).requires_grad_(), t(*[1.5] * 8).requires_grad_()
    y = kernels.level_grid(x, levels, alpha, axis=0, clip_gradient=False)
    close(y, -1.5, -0.9, -0.3, 0, 0.15, 0.45, 1.2, 1.5)
    y.sum().backward()
    close(alpha.grad, -1, 0, 0.02, 0, 0.0333333, -0.0466667, 0.1, 0.0666667)
    close(x.grad, *[1] * 8)


def test_level_grid_ties_go_to_the_smaller_magnitude(t):
    levels, one = t(-1, -0.5, 0, 0.5, 1), t(1)
    close(kernels.level_grid(t(-0.75, -0.25, 0.25, 0.75, 9, -9), levels, one), -0.5, 0, 0, 0.5, 1, -1)
    close(kernels.level_grid(t(-0.1, 0, 0.1), t(-1, 1), one), -1, 1, 1)


def test_rescale(t):
    sums = torch.tensor([[[-7.0, 1, 3, 5, 900]], [[-8.0, 2, 4, 6, 900]]], dtype=torch.float64).movedim(0, 1)
    half, zero = torch.tensor([0.5, 0.25]), torch.zeros(1)
    codes = kernels.rescale(sums, half, zero, -3, 100, dtype=torch.int8)
    assert codes.dtype == torch.int8 and codes.tolist() == [[[-3, 0, 2, 2, 100], [-2, 0, 1, 2, 100]]]
    upwards = kernels.rescale(sums, half, zero, -1e6, 1e6, rounding="half_up")
    assert upwards.tolist() == [[[-3, 1, 2, 3, 450], [-2, 1, 1, 2, 225]]]
    large = torch.full((1, 1), 2.0**23 + 1)  # the product needs 47 bits
    assert kernels.rescale(large, t(2.0**23 - 1).double(), zero, 0, 2**60, dtype=torch.float64).item() == 2**46 - 1


def test_regrid():
    """Sums become codes, and the sum of two codes those of two other grids, by a line and by a table."""
    sums = torch.tensor([[-7.0], [3.0], [5.0], [900.0]], dtype=torch.float64)
    other = torch.tensor([[1], [2], [3], [250]], dtype=torch.uint8)
    constants = [torch.tensor([v], dtype=torch.float64).T for v in ([0.5, 0, -3, 100, 3, 0], [2, 1, 0, 255, 0, 0.25])]
    table = (torch.arange(256)[:, None] + torch.arange(256)[None]).clamp(max=255).flatten().to(torch.uint8)
    steps = [Step("half_even", 0, 4, 0), Step("half_even", 4, 2, 1, 1), Step("table", 4, 3, 0, 1)]
    line, tabled = kernels.regrid([sums, other], steps, [torch.float32, torch.uint8], constants, [table])
    assert line.flatten().tolist() == [1, 12, 12, 255]  # 3 + -3, 2, 2, 100 -> 0, 5, 5, 103; 2 v + other / 4 + 1
    assert tabled.flatten().tolist() == [1, 7, 8, 255]
    runtimes = kernels.regrid([torch.full((1, 1), 2.0**24 + 2)], [Step("float32", 0, 1, 0)], [torch.float64], [
        torch.tensor([[0.5, 9, -1e9, 1e9, 4, 0]], dtype=torch.float64).T
    ])  # fmt: skip
    assert runtimes[0].item() == 2**23 + 1 + 4
    x = torch.randn(4, 3, 5, generator=torch.Generator().manual_seed(0))
    grid = torch.tensor([[0.3, 2, -4, 5, 4, 0]], dtype=torch.float64).T
    codes = kernels.regrid([x], [Step("grid", 0, 1, 0)], [torch.uint8], [grid])[0]
    wanted = kernels.quantize(x, torch.tensor([0.3]), torch.tensor([2.0]), -4, 5)
    assert torch.equal(codes.int() - 4, wanted) and wanted.min() == -4 and wanted.max() == 5


def test_hysteresis(t):
    before, after = t(-0.2, -0.05, 0.3, 0.02, -0.4, 0.5), t(0.15, 0.04, -0.2, -0.03, -0.5, 0.6)
    signs, _ = kernels.hysteresis(before, torch.zeros_like(before), 0)
    state, scale = kernels.hysteresis(after, signs, 0.1)
    w = 0.2533333
    close(state * scale, w, -w, -w, w, -w, w)
    assert kernels.hysteresis(t(0, -0.0, -1), t(-1, -1, 1), 0)[0].tolist() == [1, 1, -1]
    assert kernels.hysteresis(t(0.1, -0.1, 0.09), t(-1, 1, -1), 0.1)[0].tolist() == [1, -1, -1]


def test_statistics(t):
    given = {"center": t(1), "first": t(-2), "width": t(1), "bins": 4}
    s = kernels.tensor_stats(t(-2, 0, 1, 0, 3), **given)
    assert [v.item() for v in s[:9]] == [5, 2, 0, -2, 3, 2, 14, -8 + 1 + 27, 16 + 1 + 81]
    assert [v.item() for v in s[9:14]] == [6, 2, 4, 10, 3 + 1 + 0 + 1 + 2]
    assert s.histogram.tolist() == [[1, 0, 0, 2]]
    again = kernels.tensor_stats(t(-2, 0, 1, 0, 3), **given, powers=False)
    assert again.sum_deviation.item() == 7 and again.histogram.tolist() == [[1, 0, 0, 2]] and again.sum.item() == 0
    edge = torch.nextafter(t(-1), t(-2))  # a difference from the first edge would be rounded into the next bin
    assert kernels.tensor_stats(edge, first=t(-3), width=t(1), bins=4).histogram.tolist() == [[0, 1, 0, 0]]
