"""Example arguments for every operator, for torch's own checks and for the comparison of devices."""

import torch
from torch import Tensor

from .fused_conv.reference import blocked


def arguments(device: torch.device, images: int = 2, size: int = 5) -> dict[str, tuple]:
    """Returns arguments of each operator; differentiable ones require a gradient.

    Args:
        device: Device of the tensors. Their values are drawn on the CPU, so that they are the same on every device.
        images: Number of images of the quantized tensor, `[images, 3, size, size]`.
        size: Height and width.
    """
    generator = torch.Generator().manual_seed(0)

    def t(*shape: int, low: float = 0.1) -> Tensor:
        return (torch.rand(shape, generator=generator) + low).to(device)

    def learned(*shape: int) -> Tensor:
        return t(*shape).requires_grad_()

    def whole(low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(low, high, shape, generator=generator).to(device)

    x = t(images, 3, size, size, low=-0.5).to(memory_format=torch.channels_last)
    leaf, s, z, levels = x.clone().requires_grad_(), t(3), t(3), torch.linspace(-1, 1, 5).to(device)
    limits = torch.stack([torch.zeros(3), torch.full((3,), 7.0)]).to(device)
    noise = torch.rand(x.shape, generator=generator).to(device).to(memory_format=torch.channels_last)
    uniform = (s, z, 0.0, 7.0, limits, 1)
    affine = (s, z, -z, 0.0, 15.0, None, 1)
    rows = torch.stack([s.double() * 90, s.double(), s.double() * 0, s.double() * 0 + 255, s.double() * 0, s.double()])
    passes = ([rows], [torch.arange(65536).to(torch.uint8).to(device)], [0, 0, -1, 2, 0, 7, 2, 1, 3, 0], [2, 2])
    codes = whole(0, 9, images, 3, size, size).to(torch.uint8)
    conv = ([1, 1], [1, 1], [1, 1], 1, 8, 4, "per_op", "half_even")
    normed = (learned(3), learned(3), x.clone().requires_grad_(), 1e-5, 0.0, 6.0)
    moments = (s, z, z, s)  # weight, bias, mean, variance
    return {
        "batch_norm": (leaf, *normed),
        "batch_norm_backward": (x, x.flip(0), x, x.clamp(0), *moments, 1e-5, 0.0, 6.0, True),
        "round_to": (leaf, "half_even", None),
        "fake_quantize": (leaf, *uniform, "half_even", None),
        "fake_quantize_backward": (x, x, *uniform),
        "quantize": (x, *uniform, "half_even", None),
        "lsq": (leaf, learned(3), learned(3), -4.0, 3.0, None, 1, "half_even", 0.5),
        "lsq_backward": (x, x, s, None, -4.0, 3.0, None, 1, "half_even", 0.5),
        "pact": (leaf, learned(3), 15.0, False, 1, "half_even"),
        "pact_backward": (x, x, s, True, 1),
        "dorefa_weight": (leaf, 15.0, False, True, "half_even"),
        "dorefa_weight_backward": (x, x, x.tanh(), x.tanh().abs().amax(), True),
        "gemmlowp": (leaf, *affine, "half_even", noise),
        "gemmlowp_codes": (x, *affine, "half_even", noise),
        "gemmlowp_backward": (x, x, *affine),
        "level_grid": (leaf, levels, learned(3), 1, True),
        "level_grid_backward": (x, x, levels, s, 1, True),
        "hysteresis": (x, x.sign(), 0.1),
        "regrid": ([x, codes], *passes),
        "fused_conv": (
            codes,
            blocked(whole(-127, 128, 3, 3).to(torch.int8)),
            whole(-99, 99, 3).int(),
            7,
            [1, 1] * 2 + [0, 0, 1, 1],
            [codes],
            *passes,
            False,
        ),
        "rescale": (x, s.double(), s.double(), -9.0, 9.0, "half_even", torch.int8),
        "tensor_stats": (x, 1, s, s.round(), s, 4, True),
        "fixed_point_conv2d": (leaf, learned(6, 3, 3, 3), learned(6), *conv),
        "winograd_conv2d": (whole(0, 4, images, 3, 6, 7), whole(-3, 4, 2, 3, 3, 3), 4, True, 1, False),
    }
