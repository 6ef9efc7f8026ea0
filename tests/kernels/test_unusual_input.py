"""Operators that are no elementwise map: unusual shapes, layouts, dtypes and values give what the reference gives."""

import pytest
import qexp_kernels as kernels
import torch

NAN, INF = float("nan"), float("inf")
FLOAT_FORMAT = {"bits": 8, "fraction_bits": 4}


def both(compiled: str, call) -> list[tuple[torch.Tensor, ...]]:
    """Returns what the compiled kernels and the references give."""
    results = []
    for which in (compiled, "reference"):
        kernels.load(which)
        y = call()
        results.append(y if isinstance(y, tuple) else (y,))
    return results


def assert_same(compiled: str, call) -> tuple[torch.Tensor, ...]:
    got, want = both(compiled, call)
    for one, two in zip(got, want, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-6, atol=0, equal_nan=True)
    return got


def normal(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(4))


LAYOUTS = {
    "sliced": lambda t: t[..., ::2],
    "transposed": lambda t: t.transpose(-1, -2),
    "expanded": lambda t: t[:1].expand(3, *t.shape[1:]),
    "offset": lambda t: t[..., 1:],
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_memory_layout_does_not_matter(compiled, device, layout):
    x = LAYOUTS[layout](normal(4, 5, 8, 10).to(device))
    codes = x.mul(20).round().clamp(-7, 7).to(torch.int8)
    view = LAYOUTS[layout](normal(4, 5, 8, 10).to(device).mul(20).round().clamp(-7, 7).to(torch.int8))
    weight = normal(3, 5, 3, 3).to(device)
    whole = weight.mul(9).round().to(torch.int16).transpose(2, 3)
    assert not view.is_contiguous() and not x.is_contiguous()
    assert torch.equal(view, codes)
    assert_same(compiled, lambda: kernels.hysteresis(x, codes.sign() * 2 + 1, 0.3))
    assert_same(compiled, lambda: kernels.fixed_point_conv2d(x, weight.transpose(2, 3), **FLOAT_FORMAT))
    assert_same(compiled, lambda: kernels.winograd_conv2d(view, whole, outputs=4, padding=1))


def test_floating_point_types(compiled, device, dtype):
    x, w = (normal(*s).to(device, dtype) for s in ((2, 4, 6, 6), (5, 4, 3, 3)))
    (y,) = assert_same(compiled, lambda: kernels.fixed_point_conv2d(x, w, **FLOAT_FORMAT))
    assert y.dtype == dtype
    for state in (torch.float32, dtype, torch.int8):
        signs, _ = assert_same(compiled, lambda s=state: kernels.hysteresis(x, x.sign().to(s), 0.3))
        assert signs.dtype == state


@pytest.mark.parametrize("shape", [(), (1,), (0,), (0, 3, 5, 5)], ids=str)
def test_empty_and_single_elements(compiled, device, shape):
    x = torch.full(shape, 0.4, device=device)
    signs, scale = assert_same(compiled, lambda: kernels.hysteresis(x, torch.ones_like(x), 0.1))
    assert signs.shape == shape and scale.shape == () and scale.isfinite()
    s = assert_same(compiled, lambda: tuple(kernels.tensor_stats(x)[:4]))
    assert s[0].item() == x.numel()


def test_convolutions_of_no_image(compiled, device):
    x, w = torch.zeros(0, 4, 6, 6, device=device), torch.ones(5, 4, 3, 3, device=device)
    (y,) = assert_same(compiled, lambda: kernels.fixed_point_conv2d(x, w, **FLOAT_FORMAT))
    accumulators, saturated = assert_same(compiled, lambda: kernels.winograd_conv2d(x.int(), w.int()))
    assert y.shape == accumulators.shape == (0, 5, 4, 4) and saturated.tolist() == [0, 0]
    (rows,) = assert_same(compiled, lambda: kernels.fixed_point_linear(x[:, :, 0, 0], w[:, :, 0, 0], **FLOAT_FORMAT))
    assert rows.shape == (0, 5)


def test_a_weight_that_is_no_number_keeps_its_sign_and_shows_in_the_scale(compiled, device):
    latent, state = torch.tensor([NAN, INF, -INF, 0.05], device=device), torch.tensor([-1.0, -1, 1, -1], device=device)
    signs, scale = assert_same(compiled, lambda: kernels.hysteresis(latent, state, 0.1))
    assert signs.tolist() == [-1, 1, -1, -1] and scale.isnan()


def test_torch_makes_no_tensor_of_negative_strides(plain_x):
    """So none can reach an operator: a flip copies, and an array walked backwards is refused."""
    with pytest.raises(ValueError, match="negative"):
        torch.from_numpy(plain_x.cpu().numpy()[::-1])
    with pytest.raises(RuntimeError, match=r"[Nn]egative"):
        plain_x.as_strided((2,), (-1,), 1)
    assert min(plain_x.flip(0).stride()) > 0
