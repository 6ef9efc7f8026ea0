"""Operations written as modules, so that a recipe can address them by name (`"*.add"`) and attach to them."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Add(nn.Module):
    """The sum of two tensors of one shape.

    Attributes:
        inplace: Writes the sum into the first operand; only safe if nothing else reads that operand (see `lean`).
    """

    inplace: bool = False

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        if self.inplace and a.shape == b.shape and a.dtype == b.dtype:
            return a.add_(b)
        return a + b


class Concat(nn.Module):
    """The operands side by side along the channels (`dim` 1): [N, C1, H, W], [N, C2, H, W] -> [N, C1 + C2, H, W]."""

    def __init__(self, dim: int = 1) -> None:
        super().__init__()
        self.dim = dim

    def forward(self, *xs: Tensor) -> Tensor:
        return torch.cat(xs, self.dim)

    def extra_repr(self) -> str:
        return f"dim={self.dim}"


class StridedPad(nn.Module):
    """The parameter-free "option A" shortcut: every `stride`-th pixel, new channels zero, half of them on each side.

    [N, C, H, W] -> [N, C + extra, ceil(H / stride), ceil(W / stride)]; an odd `extra` puts the larger half behind.

    Source: He, Zhang, Ren, Sun 2015, arXiv:1512.03385, section 3.3 (A).
    """

    def __init__(self, extra: int, stride: int) -> None:
        super().__init__()
        self.before = extra // 2
        self.after = extra - self.before
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        return F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.before, self.after))

    def extra_repr(self) -> str:
        return f"before={self.before}, after={self.after}, stride={self.stride}"


def conv_bn(in_channels: int, out_channels: int, kernel: int = 1, stride: int = 1) -> nn.Sequential:
    """A bias-free convolution (entry `0`) followed by batch normalisation (entry `1`)."""
    conv = nn.Conv2d(in_channels, out_channels, kernel, stride, padding=kernel // 2, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(out_channels))
