"""Batch normalisation with what follows it: against PyTorch's operations, and compiled = reference for every layout and dtype."""

import math

import pytest
import qexp_kernels as kernels
import torch
from torch.nn import functional as F

ROUNDING = {torch.float64: 1e-12, torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
AFTER = {"nothing": (-math.inf, math.inf), "relu": (0.0, math.inf), "relu6": (0.0, 6.0)}


def parameters(channels, like):
    generator = torch.Generator().manual_seed(4)
    return [(torch.rand(channels, generator=generator) + low).to(like.device).requires_grad_() for low in (0.5, -0.5)]


def leaves(x, added):
    tensors = [x, *parameters(x.shape[1], x), *([x.flip(0) * 0.7] if added else [])]
    return [t.detach().clone(memory_format=torch.preserve_format).requires_grad_() for t in tensors]


def results(x, added, after, readers):
    """Returns the result, mean and variance, and all gradients, with one reader of the result or two."""
    inputs = leaves(x, added)
    low, high = AFTER[after]
    y, mean, variance, again = kernels.batch_norm(
        *inputs[:3], eps=1e-5, added=inputs[3] if added else None, low=low, high=high
    )
    g = torch.linspace(-1, 1, y.numel(), device=x.device).reshape(y.shape).to(y.dtype)
    gradients = torch.autograd.grad([y, again][:readers], inputs, [g, g * 0.3][:readers])
    return [y, mean, variance, *gradients]


@pytest.mark.parametrize("readers", [1, 2])
@pytest.mark.parametrize("added", [False, True], ids=["alone", "sum"])
@pytest.mark.parametrize("after", AFTER)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["planes", "rows"])
def test_results_and_gradients_are_those_of_pytorch(implementation, device, layout, after, added, readers):
    x = torch.randn(7, 5, 9, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) * 3 + 40
    x = x.to(device).contiguous(memory_format=layout)
    got = results(x, added, after, readers)
    inputs = leaves(x, added)
    y = F.batch_norm(x := inputs[0], None, None, inputs[1].double(), inputs[2].double(), True, eps=1e-5)
    y = y + inputs[3] if added else y
    y = {"nothing": lambda t: t, "relu": F.relu, "relu6": F.relu6}[after](y)
    g = torch.linspace(-1, 1, y.numel(), device=device).reshape(y.shape).double()
    variance, mean = torch.var_mean(x.detach(), (0, 2, 3), correction=0)
    wanted = [y, mean, variance, *torch.autograd.grad(y, inputs, g + g * 0.3 if readers == 2 else g)]
    for one, two in zip(got, wanted, strict=True):
        torch.testing.assert_close(
            one.double(), two.double(), rtol=1e-6, atol=1e-6 if one.dtype == torch.float32 else 1e-9
        )


@pytest.mark.parametrize("readers", [1, 2])
@pytest.mark.parametrize("added", [False, True], ids=["alone", "sum"])
def test_compiled_is_the_reference(x, compiled, added, readers):
    if x.numel() <= x.shape[1]:
        pytest.skip("one value per channel")
    found = []
    for which in (compiled, "reference"):
        kernels.load(which)
        found.append(results(x, added, "relu6", readers))
    for got, wanted in zip(*found, strict=True):
        assert got.dtype == wanted.dtype and got.stride() == wanted.stride()
        most = (
            wanted.double().abs().max() * ROUNDING[x.dtype] + 1e-5
        )  # one implementation rounds sums of gradients before the next step
        assert (got.double() - wanted.double()).abs().max() <= most


def test_channels_far_from_zero_lose_no_digits(implementation, device):
    x = (
        torch.randn(64, 40, generator=torch.Generator().manual_seed(2)).to(device) * 0.01
        + torch.arange(40.0, device=device) * 10
    )
    _, mean, variance, _ = kernels.batch_norm(x, *parameters(40, x), eps=1e-5)
    exact, center = torch.var_mean(x.double(), 0, correction=0)
    torch.testing.assert_close(mean.double(), center, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(variance.double(), exact, rtol=1e-6, atol=0)


def test_result_does_not_depend_on_the_number_of_threads(compiled):
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            for shape in ((40, 24, 17, 17), (300, 70, 5, 5)):
                x = torch.randn(shape, generator=torch.Generator().manual_seed(3))
                for layout in (torch.contiguous_format, torch.channels_last):
                    found.append(results(x.contiguous(memory_format=layout), True, "relu", 2))
    finally:
        torch.set_num_threads(before)
    half = len(found) // 2
    for one, two in zip(found[:half], found[half:], strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


def test_nan_stays_nan(implementation, device):
    x = torch.randn(4, 3, 2, device=device)
    x[1, 2, 0] = math.nan
    y, mean, variance, _ = kernels.batch_norm(x, *parameters(3, x), eps=1e-5, low=0.0)
    assert y[:, 2].isnan().all() and mean[2].isnan() and variance[2].isnan() and y[:, :2].isfinite().all()


@pytest.mark.parametrize(
    "change, message",
    [
        ({"x": torch.zeros(1, 3)}, "more than one value per channel"),
        ({"x": torch.zeros(3)}, "1 dimensions"),
        ({"weight": torch.ones(2)}, r"weight: got shape \[2\]"),
        ({"added": torch.zeros(2, 3, 5)}, "added: got"),
        ({"added": torch.zeros(2, 3, 4, dtype=torch.float64)}, "added: got"),
        ({"low": 1.0, "high": 1.0}, "expected low < high"),
        ({"x": torch.zeros(2, 3, 4, dtype=torch.int32)}, "got dtype"),
    ],
)
def test_wrong_arguments_are_refused(change, message):
    given = {"x": torch.randn(2, 3, 4), "weight": torch.ones(3), "bias": torch.ones(3), "eps": 1e-5} | change
    with pytest.raises(kernels.KernelError, match=message):
        kernels.batch_norm(**given)
