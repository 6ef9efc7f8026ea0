"""Compiled = reference, for every operator, memory layout and dtype: bitwise, and sums to their rounding."""

import pytest
import qexp_kernels as kernels
import torch
from qexp_kernels.regrid import Step


def test_forward_and_gradient_of_x_are_bitwise_those_of_the_reference(case, x, compiled, evaluate):
    y, (dx, *parameters) = evaluate(case, x)
    kernels.load("reference")
    reference_y, (reference_dx, *reference_parameters) = evaluate(case, x)
    assert torch.equal(y, reference_y)
    assert y.dtype == x.dtype and y.stride() == reference_y.stride() == torch.empty_like(x).stride()
    if dx.dtype != torch.float16 or dx.isfinite().all():
        torch.testing.assert_close(dx, reference_dx, rtol=1e-5, atol=1e-6)
    for got, want in zip(parameters, reference_parameters, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=2e-4)


def test_codes_are_those_of_the_reference(x, compiled):
    scale = torch.linspace(0.1, 0.9, 6, device=x.device)
    zero_point = torch.arange(6.0, device=x.device)

    def codes():
        return kernels.quantize(x, scale, zero_point, -8, 7, axis=1)

    got = codes()
    kernels.load("reference")
    assert torch.equal(got, codes()) and got.dtype == torch.int32


def test_another_grid_is_that_of_the_reference(x, compiled):
    x = x if x.dtype == torch.float64 else x.float()
    factor, summand = torch.linspace(0.1, 90, 6, dtype=torch.float64), torch.arange(-3.0, 3)
    places = [(torch.float32, -1e6, 1e6), (torch.float64, -1e9, 1e9), (torch.uint8, 3, 255), (torch.int8, -128, 127)]
    for rounding in ("half_even", "half_up", "half_away", "floor", "trunc"):
        for dtype, low, high in places:
            for by in (1, 6):
                given = factor[:by].to(x.device), summand[:by].to(x.device), low, high
                kernels.load(compiled)
                got = kernels.rescale(x, *given, rounding=rounding, dtype=dtype)
                kernels.load("reference")
                want = kernels.rescale(x, *given, rounding=rounding, dtype=dtype)
                assert torch.equal(got, want) and got.dtype == dtype and got.stride() == want.stride()


def test_several_results_of_one_pass_are_those_of_the_reference(x, compiled):
    x = x if x.dtype == torch.float64 else x.float()
    codes = (x * 40).clamp(-128, 127).round().add(128).to(torch.uint8).contiguous()  # of another layout than x
    low, high, rest = torch.full((6,), -9.0), torch.full((6,), 200.0), torch.linspace(-0.5, 3, 6)
    rows = torch.stack([torch.linspace(0.1, 90, 6), torch.arange(-3.0, 3), low, high, low * 0 + 9, rest]).double()
    varied = rows.clone()
    varied[2], varied[4] = torch.arange(6.0), torch.arange(6.0)
    constants = [c.to(x.device) for c in (rows, rows[:, :1].contiguous(), varied)]
    table = torch.arange(65536, device=x.device).mul(7).remainder(256).to(torch.uint8)
    for kind in ("half_even", "half_up", "half_away", "floor", "trunc", "none", "float32", "grid"):
        for at in range(3):
            second = -1 if kind in ("float32", "grid") else 1
            steps = [
                Step("half_even", 0, 5, at), Step(kind, 0, 2, at), Step(kind, 5, 3, at, second),
                Step("table", 5, 4, 0, 1), Step("table", 4, 6, 1), Step("trunc", 6, 4, at),
            ]  # fmt: skip
            found = []
            for which in (compiled, "reference"):
                kernels.load(which)
                dtypes = (torch.float64, torch.float32, torch.uint8)
                found.append(kernels.regrid([x, codes], steps, dtypes, constants, [table, table[:256].contiguous()]))
            for got, want in zip(*found, strict=True):
                assert torch.equal(got, want) and got.dtype == want.dtype and got.stride() == want.stride()


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("channels", [1, 7, 1500])
def test_scaled_values_and_their_codes(channels, layout, compiled, device):
    """From sums in each form, with numbers per channel of some or of all constants, and a place of values in between."""
    g = torch.Generator().manual_seed(channels)
    shape = (2, channels, 5, 3)
    sums = torch.randint(-5000, 5000, shape, generator=g).float().contiguous(memory_format=layout).to(device)
    other = torch.randn(shape, generator=g).to(device)
    rows = [torch.rand(channels, generator=g) * 0.02, torch.randn(channels, generator=g)]
    rows += [torch.full((channels,), v) for v in (0.0, 6.0, 0.0, 0.031)]
    line = torch.stack(rows).double().to(device)
    varied = line.clone()
    varied[3] = torch.rand(channels, generator=g) * 5
    grid = torch.tensor([0.07, 2.0, 0, 15, 1, 0]).double()[:, None].to(device)
    steps = [Step("scaled", 0, 5, 0, 1), Step("grid", 5, 2, 1), Step("scaled", 0, 3, 0), Step("grid", 3, 4, 1)]
    for constants in (line, line[:, :1].contiguous(), varied):
        for x in (sums, sums.double(), sums.clamp(0, 255).byte()):
            found = []
            for which in (compiled, "reference"):
                kernels.load(which)
                found.append(
                    kernels.regrid([x, other], steps, [torch.uint8, torch.float32, torch.uint8], [constants, grid])
                )
            for got, want in zip(*found, strict=True):
                assert torch.equal(got, want) and got.dtype == want.dtype and got.stride() == want.stride()


@pytest.mark.parametrize("channels", [1, 5, 1500])
def test_codes_beside_the_middle_between_two_are_those_of_the_reference(channels, compiled, device):
    """Where float32 cannot tell which code is nearer: sums of products that lie at most a few roundings beside the middle."""
    g = torch.Generator().manual_seed(channels)
    factor = torch.rand(channels, generator=g).double() * 0.004 + 1e-4
    summand = torch.randn(channels, generator=g).double() * 90
    near = torch.randint(-3, 259, (40, channels, 4), generator=g) + 0.5 - summand[:, None]
    sums = (near / factor[:, None]).round() + torch.randint(-1, 2, near.shape, generator=g)
    sums[::3] = torch.randint(-(2**24), 2**24, sums[::3].shape, generator=g).double()
    bytes_ = torch.randint(0, 256, sums.shape, generator=g).to(torch.uint8)
    shared = torch.tensor([0.0, 255, 0, 0]).double()[:, None].expand(4, channels)
    moved = torch.tensor([-128.0, 127, 128, 0]).double()[:, None].expand(4, channels)
    one, wide = torch.stack([factor, summand]), torch.stack([factor, summand * 1e5])
    ties = torch.tensor([0.25, 3.0, 0, 255, 0, 0.5]).double()[:, None]  # every second result
    two = torch.tensor([1.4289, -210.05, 0, 255, 0, 0.797]).double()[:, None]
    constants = [torch.cat([one, shared]), torch.cat([wide, shared]), torch.cat([one, moved]), ties, two]
    constants = [c.contiguous().to(device) for c in constants]
    for kind in ("half_even", "half_up", "half_away"):
        for x, steps in (
            (sums.float(), [Step(kind, 0, 2 + k, k) for k in range(4)]),
            (sums, [Step(kind, 0, 2 + k, k) for k in range(4)]),
            (bytes_, [Step(kind, 0, 2 + k, 3 + k // 2, k % 2) for k in range(4)]),
        ):
            for layout in (x, x.transpose(1, 2).contiguous().transpose(1, 2)):
                found = []
                for which in (compiled, "reference"):
                    kernels.load(which)
                    given = [layout.to(device), bytes_.to(device)]
                    found.append(kernels.regrid(given, steps, [torch.uint8] * 4, constants))
                for got, want in zip(*found, strict=True):
                    assert torch.equal(got, want), (kind, x.dtype)


def test_statistics_are_those_of_the_reference(x, compiled):
    channels = {"center": 0.1, "first": -11.0, "width": 0.13}
    for axis, count in ((None, 1), (1, 6), (3, x.shape[3])):
        given = {k: torch.linspace(v, v * 1.1, count, device=x.device) for k, v in channels.items()}
        given["first"] = given["first"].round()
        forms = (given | {"bins": 19}, given | {"bins": 19, "powers": False}, {"center": given["center"]}, {})
        for form in forms:
            kernels.load(compiled)
            got = kernels.tensor_stats(x, axis=axis, **form)
            kernels.load("reference")
            want = kernels.tensor_stats(x, axis=axis, **form)
            for name, one, two in zip(got._fields, got, want, strict=True):
                if name.startswith("sum"):
                    torch.testing.assert_close(one, two, rtol=1e-12, atol=1e-9)
                else:
                    assert torch.equal(one, two), (name, axis, form)


def test_statistics_of_many_short_runs_are_those_of_the_reference(compiled, device):
    """A chunk sums the few channels it touches."""
    x = torch.randn(40_000, 7, generator=torch.Generator().manual_seed(2)).to(device)
    for form in (x, x[:, 0]):
        kernels.load(compiled)
        got = kernels.tensor_stats(form, axis=0)
        kernels.load("reference")
        for one, two in zip(got, kernels.tensor_stats(form, axis=0), strict=True):
            torch.testing.assert_close(one, two, rtol=1e-12, atol=1e-9)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_statistics_of_many_images_in_several_chunks_are_those_of_the_reference(compiled, device, layout):
    x = (
        torch.randn(40, 24, 17, 17, generator=torch.Generator().manual_seed(3))
        .to(device)
        .contiguous(memory_format=layout)
    )
    for axis in (None, 0, 1):
        kernels.load(compiled)
        got = kernels.tensor_stats(x, axis=axis)
        kernels.load("reference")
        for one, two in zip(got, kernels.tensor_stats(x, axis=axis), strict=True):
            torch.testing.assert_close(one, two, rtol=1e-12, atol=1e-9)


def test_result_does_not_depend_on_the_number_of_threads(compiled):
    x = torch.randn(300_000, generator=torch.Generator().manual_seed(0))
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            scale = torch.tensor(0.3, requires_grad=True)
            kernels.lsq(x, scale, -8, 7).square().sum().backward()
            results.append((scale.grad, *kernels.tensor_stats(x)[:14]))
    finally:
        torch.set_num_threads(before)
    for one, two in zip(*results, strict=True):
        assert torch.equal(one, two)


def test_a_large_tensor_is_covered_to_its_end(compiled, device):
    x = torch.linspace(-3, 3, 1_000_003, device=device)
    one = torch.ones(1, device=device)
    assert torch.equal(kernels.fake_quantize(x, one, one * 0, -2, 2), x.clamp(-2, 2).round())
