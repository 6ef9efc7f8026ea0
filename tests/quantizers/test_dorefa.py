"""DoReFa's weights: the gradient of the restored magnitude, and running more than once before a backward pass."""

import torch

from qexp.quantizers.dorefa import DoReFaWeight


def test_the_restored_magnitude_of_dorefa_has_its_gradient() -> None:
    """With rounding replaced by its gradient, max|tanh| * tanh / max|tanh| is tanh: the largest weight is no exception."""
    w = torch.randn(50, generator=torch.Generator().manual_seed(0)).requires_grad_()
    quantizer = DoReFaWeight(8, (50,), rescale="max")
    upstream = torch.randn(50, generator=torch.Generator().manual_seed(1))
    (quantizer(w) * upstream).sum().backward()
    expected = upstream * (1 - torch.tanh(w.detach()) ** 2)
    # the maximum also scales the rounding error: at 8 bits that is small beside the straight-through part
    assert torch.allclose(w.grad, expected, atol=0.1)


def test_a_quantizer_may_run_twice_before_backward() -> None:
    w = torch.randn(3, 3, requires_grad=True)
    quantizer = DoReFaWeight(4, (3, 3), rescale="max")
    (quantizer(w) @ quantizer(w)).sum().backward()
    assert torch.isfinite(w.grad).all()
