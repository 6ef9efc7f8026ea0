"""Sizes and places in memory at which launches differ: unaligned starts, grids that go round again, many channels, nothing at all."""

import pytest
import qexp_kernels as kernels
import torch
from torch import Tensor

DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
SUMMED = {"lsq_backward", "lsq_backward_offset", "pact_backward", "mpact_backward", "level_grid_backward"}


def normal(n: int, dtype: torch.dtype, device: torch.device, seed: int = 0) -> Tensor:
    """Returns normal numbers, a third of them ties and exact steps of the scales in use."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(n, generator=g)
    ties = torch.randint(-20, 20, (n,), generator=g) * 0.15
    return torch.where(torch.rand(n, generator=g) < 0.3, ties, x).to(device, dtype)


def calls(x: Tensor, g: Tensor, s: Tensor, z: Tensor, axis: int | None) -> dict:
    """Returns every elementwise operator and its gradient, called directly; scales `s` and zero points `z` are shared or by channel."""
    q = torch.ops.qexp
    noise = torch.rand(x.shape, generator=torch.Generator().manual_seed(1)).to(x.device)
    levels = torch.tensor([-1.0, -0.5, -0.25, 0, 0.25, 0.5, 1], device=x.device)
    t = torch.tanh(x.float() if x.dtype != torch.float64 else x)
    peak = t.abs().amax() if t.numel() else t.new_zeros(())
    found = {
        "round_to": lambda: q.round_to(x, "half_away", None),
        "round_to_stochastic": lambda: q.round_to(x, "stochastic", noise),
        "fake_quantize": lambda: q.fake_quantize(x, s, z, 0.0, 15.0, None, axis, "half_up", None),
        "fake_quantize_backward": lambda: q.fake_quantize_backward(g, x, s, z, 0.0, 15.0, None, axis),
        "quantize": lambda: q.quantize(x, s, z, -8.0, 7.0, None, axis, "half_even", None),
        "gemmlowp": lambda: q.gemmlowp(x, s, z, -z, 0.0, 15.0, None, axis, "half_away", noise),
        "gemmlowp_codes": lambda: q.gemmlowp_codes(x, s, z, -z, 0.0, 15.0, None, axis, "stochastic", noise),
        "gemmlowp_backward": lambda: q.gemmlowp_backward(g, x, s, z, -z, 0.0, 15.0, None, axis),
        "lsq": lambda: q.lsq(x, s, z, -4.0, 3.0, None, axis, "half_even", 0.1),
        "lsq_backward": lambda: q.lsq_backward(g, x, s, None, -4.0, 3.0, None, axis, "half_even", 0.1),
        "lsq_backward_offset": lambda: q.lsq_backward(g, x, s, z, 0.0, 7.0, None, axis, "trunc", 0.1),
        "pact": lambda: q.pact(x, s, 15.0, False, axis, "half_even"),
        "mpact": lambda: q.pact(x, -s, 7.0, True, axis, "half_even"),
        "pact_backward": lambda: q.pact_backward(g, x, s, False, axis),
        "mpact_backward": lambda: q.pact_backward(g, x, -s, True, axis),
        "level_grid": lambda: q.level_grid(x, levels, s, axis, True),
        "level_grid_backward": lambda: q.level_grid_backward(g, x, levels, s, axis, True),
        "dorefa_weight": lambda: q.dorefa_weight(x, 7.0, True, True, "half_even"),
        "dorefa_weight_backward": lambda: q.dorefa_weight_backward(g, x, t, peak, True),
        "hysteresis": lambda: q.hysteresis(x, torch.where(g > 0, 1, -1).to(torch.int8), 0.3),
        "tensor_stats": lambda: q.tensor_stats(x, axis, z, (z - 9).round(), s, 21, True),
    }
    if x.dtype in (torch.float32, torch.float64) and (axis == 1 or axis is None) and x.dim() > 1:
        rows = torch.stack([s.double() * 9, *(torch.full_like(s.double(), v) for v in (0.5, -9.0, 9.0, 9.0, 0.0))])
        found["regrid"] = lambda: tuple(q.regrid([x], [rows], [], [0, 0, -1, 1, 0, 3, 0, -1, 2, 0], [2, 0]))
        found["rescale"] = lambda: q.rescale(x, s.double() * 9, z.double(), -9.0, 9.0, "half_even", torch.int8)
    return found


def compare(compiled: str, found: dict) -> None:
    """Asserts that the compiled kernels give what the references do: the same bits, and sums to their rounding."""
    kernels.load(compiled)
    got = {name: call() for name, call in found.items()}
    kernels.load("reference")
    for name, one in got.items():
        two = found[name]()
        one, two = (t if isinstance(t, tuple) else (t,) for t in (one, two))
        for k, (a, b) in enumerate(zip(one, two, strict=True)):
            assert a.shape == b.shape and a.dtype == b.dtype, (name, k)
            loose = (name in SUMMED and k > 0) or name in ("dorefa_weight_backward", "tensor_stats", "hysteresis")
            close = (
                1e-5
                if a.dtype == torch.float32
                else 2e-2
                if a.dtype == torch.bfloat16
                else 2e-3
                if a.dtype == torch.float16
                else 1e-10
            )
            torch.testing.assert_close(
                a,
                b,
                rtol=close if loose else 0,
                atol=2e-4 if loose else 0,
                equal_nan=True,
                msg=lambda m, n=name: f"{n}: {m}",
            )


def one(value: float, x: Tensor) -> Tensor:
    return torch.tensor([value], device=x.device)


@pytest.mark.parametrize("start", [0, 1, 3, 4, 8])
def test_small_sizes_from_any_start(compiled, device, dtype, start):
    base, grad = normal(100, dtype, device), normal(100, dtype, device, 1)
    for n in (1, 3, 4, 7, 8, 9, 17, 65):
        for other in {0, start}:
            x, g = base[start : start + n], grad[other : other + n]
            compare(compiled, calls(x, g, one(0.3, x), one(1.0, x), None))


SHAPES = {
    "one channel": ((4, 1, 5, 3), 1),
    "runs of 1": ((7, 5, 1, 1), 1),
    "runs of 6": ((2, 5, 2, 3), 1),
    "runs of 8": ((3, 5, 2, 4), 1),
    "first axis": ((9, 3, 3, 3), 0),
    "last axis": ((6, 35), 1),
    "33 wide": ((300, 33), 1),
    "one row": ((1, 70), 1),
    "vector": ((70,), 0),
    "many runs": ((2, 220, 3), 1),
    "many columns": ((3, 420), 1),
    "middle of five": ((2, 3, 4, 5, 6), 2),
}


@pytest.mark.parametrize("name", SHAPES)
def test_channels(compiled, device, name, dtype):
    shape, axis = SHAPES[name]
    n, c = torch.Size(shape).numel(), shape[axis]
    scales, zeros = torch.linspace(0.1, 0.9, c, device=device), torch.arange(c, device=device) % 4.0
    for start in (0, 1):
        base, grad = (normal(n + 1, dtype, device, seed)[start : start + n] for seed in (0, 1))
        x, g = base.view(shape), grad.view(shape)
        compare(compiled, calls(x, g, scales, zeros, axis))
        if start == 0 and len(shape) > 2:
            order = [*range(1, len(shape)), 0]
            compare(compiled, calls(x.permute(order), g.permute(order), scales, zeros, order.index(axis)))


@pytest.mark.parametrize("start", [0, 1])
def test_grids_that_go_round_again(compiled, device, dtype, start):
    n = 40_000  # under emulation a grid has 6 blocks of 256 threads; on a device the benchmarks go round
    x, g = (normal(n + start, dtype, device, seed)[start:] for seed in (0, 1))
    compare(compiled, calls(x, g, one(0.3, x), one(1.0, x), None))


def test_more_bins_than_shared_memory_holds(compiled, device):
    x = normal(3000, torch.float32, device)
    for bins in (1, 255, 257, 8192, 8193):
        limits = one(-bins / 2, x).round(), one(8.0 / bins, x)
        compare(
            compiled,
            {"tensor_stats": lambda n=bins, at=limits: torch.ops.qexp.tensor_stats(x, None, None, *at, n, True)},
        )


@pytest.mark.parametrize("shape", [(0, 3), (3, 0), (2, 0, 4), (0,)], ids=str)
@pytest.mark.parametrize("per_channel", [False, True])
def test_nothing(compiled, device, shape, per_channel):
    x = torch.zeros(shape, device=device)
    axis = min(1, len(shape) - 1) if per_channel else None
    c = shape[axis] if per_channel else 1
    compare(compiled, calls(x, x.clone(), torch.full((c,), 0.3, device=device), torch.zeros(c, device=device), axis))


def test_no_dimension(compiled, device):
    x = torch.tensor(0.7, device=device)
    compare(compiled, calls(x, torch.ones_like(x), x.new_tensor(0.3), x.new_tensor(1.0), None))


def test_values_that_are_no_numbers_and_scales_that_are_none(compiled, device):
    values = [0.0, -0.0, float("nan"), float("inf"), -float("inf"), 3e38, 1e-40, 1.0]
    x = torch.tensor(values, device=device)
    for scale in (0.3, 0.0, -1.0, float("inf"), float("nan"), 1e-45, 3e38):
        found = calls(x, torch.ones_like(x), one(scale, x), one(1.0, x), None)
        names = ("quantize", "gemmlowp", "gemmlowp_codes", "pact", "lsq", "fake_quantize", "level_grid")
        compare(compiled, {name: found[name] for name in names})


def test_a_second_run_gives_the_same_bits(compiled, device):
    x, g = (normal(40_000, torch.float32, device, seed).view(25, 40, 40) for seed in (0, 1))
    s, z = torch.linspace(0.1, 0.9, 40, device=device), torch.arange(40.0, device=device) % 3
    for call in calls(x, g, s, z, 1).values():
        first, second = (t if isinstance(t, tuple) else (t,) for t in (call(), call()))
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("groups, outputs", [(1, 70), (1, 3), (70, 70), (2, 20)])
@pytest.mark.parametrize("accumulate", ["per_op", "per_add"])
def test_convolutions_of_more_than_one_tile(compiled, device, groups, outputs, accumulate):
    g = torch.Generator().manual_seed(1)
    x = torch.randn(3, 70 if groups > 2 else 6, 9, 8, generator=g).to(device)
    w = torch.randn(outputs, x.shape[1] // groups, 3, 3, generator=g).to(device)
    bias = torch.randn(outputs, generator=g).to(device)
    options = {"bits": 8, "fraction_bits": 4, "padding": 1, "groups": groups, "accumulate": accumulate}
    results = []
    for which in (compiled, "reference"):
        kernels.load(which)
        results.append(kernels.fixed_point_conv2d(x, w, bias, **options))
    assert torch.equal(*results)
