"""Gradients against torch's own autograd of the formula, in float64, and at points on and beyond the limits."""

import pytest
import qexp_kernels as kernels
import torch


def straight(x):
    """Rounds with the straight-through gradient."""
    return x + (x.round() - x).detach()


def between(x, low, high):
    """Clips; the gradient is 1 strictly inside and goes to the limit elsewhere."""
    return torch.where(x <= low, low, torch.where(x >= high, high, x))


def lsq(x, s, b):
    return straight(between((x - b) / s, s.new_tensor(-4.0), s.new_tensor(3.0))) * s + b


def pact(x, a, _):
    return straight(torch.where(x < 0, 0 * a, torch.where(x >= a, a, x)) / a.detach() * 15) * (a.detach() / 15)


def dorefa(w, *_):
    t = torch.tanh(w)
    t = t / t.abs().max()
    return 2 * straight((t / 2 + 0.5) * 15) / 15 - 1


def dorefa_rescaled(w, *_):
    return dorefa(w) * torch.tanh(w).abs().max()


FORMULAS = {
    "lsq": (lsq, lambda x, s, b: kernels.lsq(x, s, -4, 3, offset=b)),
    "pact": (pact, lambda x, s, b: kernels.pact(x, s, 15)),
    "dorefa": (dorefa, lambda x, s, b: kernels.dorefa_weight(x, 15)),
    "dorefa_rescaled": (dorefa_rescaled, lambda x, s, b: kernels.dorefa_weight(x, 15, rescale=True)),
}


@pytest.mark.parametrize("name", FORMULAS)
def test_gradient_is_that_of_the_formula(implementation, device, name):
    formula, kernel = FORMULAS[name]
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(500, dtype=torch.float64, generator=generator).mul(2).to(device)
    g = torch.randn(500, dtype=torch.float64, generator=generator).to(device)
    results = []
    for f in (formula, kernel):
        leaves = [x.clone().requires_grad_(), *(x.new_tensor(v, requires_grad=True) for v in (0.7, -0.3))]
        y = f(*leaves)
        results.append((y, *torch.autograd.grad(y, leaves, g, allow_unused=True)))
    for want, got in zip(*results, strict=True):
        if want is not None and got is not None:
            torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)


def test_fake_quantize_passes_up_to_the_limits_and_no_half_step_further(implementation, device):
    x = torch.tensor([-0.26, -0.25, 0.0, 1.75, 1.76, 1.87], device=device, requires_grad=True)
    kernels.fake_quantize(x, x.new_tensor(0.25), x.new_tensor(1.0), 0, 8).sum().backward()
    assert x.grad.tolist() == [0, 1, 1, 1, 0, 0]


def test_the_gradient_is_the_same_called_directly_and_as_a_registered_operator(implementation, device):
    """The functions have a faster way to the gradient than the operators have."""
    x, s = torch.randn(40, device=device, requires_grad=True), torch.tensor(0.3, device=device, requires_grad=True)
    calls = (
        lambda: kernels.lsq(x, s, -4, 3, grad_scale=0.5),
        lambda: torch.ops.qexp.lsq(x, s, None, -4.0, 3.0, None, None, "half_even", 0.5),
    )
    results = [torch.autograd.grad(call().square().sum(), (x, s)) for call in calls]
    assert torch.equal(results[0][0], results[1][0]) and torch.equal(results[0][1], results[1][1])
    assert calls[0]().grad_fn is not None
    with torch.no_grad():
        assert calls[0]().grad_fn is None and not calls[0]().requires_grad


@pytest.mark.parametrize("unsigned", [lambda x: kernels.lsq(x, x.new_tensor(0.3), 0, 7)])
def test_unsigned_lsq_makes_a_relu_before_it_redundant(implementation, device, unsigned):
    x = torch.randn(1000, device=device, generator=torch.Generator(device).manual_seed(0)).requires_grad_()
    y, z = unsigned(x), unsigned(x.relu())
    assert torch.equal(y, z)
    assert torch.equal(*(torch.autograd.grad(v.sum(), x)[0] for v in (y, z)))


def test_weights_that_share_the_maximum_share_its_gradient(implementation, device):
    w = torch.tensor([1.0, -1.0, 0.5], dtype=torch.float64, device=device, requires_grad=True)
    kernels.dorefa_weight(w, 15).backward(torch.tensor([0.0, 0, 1], dtype=torch.float64, device=device))
    assert w.grad[0] == -w.grad[1] != 0
    step = 1e-6  # moving both together moves the maximum
    t = torch.tanh(torch.tensor([1 + step, 0.5], dtype=torch.float64))
    slope = (t[1] / t[0] - torch.tanh(t.new_tensor(0.5)) / torch.tanh(t.new_tensor(1.0))) / step
    assert (w.grad[0] - w.grad[1]).item() == pytest.approx(slope.item(), rel=1e-4)


def test_second_derivatives_are_an_error(implementation, device):
    x, s = torch.randn(9, device=device, requires_grad=True), torch.tensor(0.3, device=device, requires_grad=True)
    for y in (kernels.lsq(x, s, -4, 3), kernels.pact(x, s, 3), kernels.fake_quantize(x, s, s.detach() * 0, 0, 3)):
        g = torch.ones_like(y, requires_grad=True)
        (dx,) = torch.autograd.grad(y, x, g, create_graph=True)
        with pytest.raises((RuntimeError, kernels.KernelError), match="_backward"):
            dx.sum().backward()


def test_statistics_and_codes_carry_no_gradient(implementation, device):
    x = torch.randn(9, device=device, requires_grad=True)
    assert not kernels.tensor_stats(x).sum.requires_grad
    assert not kernels.quantize(x, x.new_tensor(0.1), x.new_tensor(0.0), 0, 3).requires_grad
    assert not kernels.hysteresis(x, torch.ones_like(x), 0.1)[1].requires_grad
