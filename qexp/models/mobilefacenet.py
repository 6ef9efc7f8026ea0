"""MobileFaceNet: a face embedding from inverted residuals with PReLU."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor, nn

from qexp.errors import QexpError
from qexp.models.modules import Add

SETTINGS = ((2, 64, 5, 2), (4, 128, 1, 2), (2, 128, 6, 1), (4, 128, 1, 2), (2, 128, 2, 1))


class MobileFaceNet(nn.Module):
    """Embeddings `[N, features]` of aligned faces `[N, 3, height, width]`, to be compared by their cosine.

    The last depthwise convolution covers the whole map, so that every place of the face has its own weights.

    Args:
        features: Length of the embedding.
        settings: (expansion, channels, blocks, stride) of each stage.
        size: Height and width of the input; multiples of the product of the strides (16).

    Raises:
        QexpError: The strides do not divide the size.

    Source: Chen et al. 2018 (arXiv 1804.07573), table 1.
    """

    def __init__(
        self,
        features: int = 128,
        settings: Sequence[Sequence[int]] = SETTINGS,
        size: Sequence[int] = (112, 96),
    ) -> None:
        super().__init__()
        shrunk = 2 * math.prod(stride for *_, stride in settings)
        if any(side < shrunk or side % shrunk for side in size):
            raise QexpError(
                f"MobileFaceNet: size={list(size)}; multiples of {shrunk} are needed, such as [112, 96], [112, 112]"
            )
        self.conv1 = Unit(3, 64, 3, 2, 1)
        self.dw_conv1 = Unit(64, 64, 3, 1, 1, groups=64)
        blocks, channels = [], 64
        for expansion, out, count, stride in settings:
            for i in range(count):
                blocks.append(InvertedResidual(channels, out, stride if i == 0 else 1, expansion))
                channels = out
        self.blocks = nn.Sequential(*blocks)
        self.conv2 = Unit(channels, 512, 1)
        self.linear7 = Unit(512, 512, (size[0] // shrunk, size[1] // shrunk), groups=512, linear=True)
        self.linear1 = Unit(512, features, 1, linear=True)

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(self.dw_conv1(self.conv1(x)))
        return self.linear1(self.linear7(self.conv2(x))).flatten(1)


class Unit(nn.Module):
    """Convolution, batch norm and, unless `linear`, PReLU."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        kernel: int | tuple[int, int],
        stride: int = 1,
        padding: int = 0,
        groups: int = 1,
        linear: bool = False,
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, kernel, stride, padding, groups=groups, bias=False)
        self.bn = nn.BatchNorm2d(outputs)
        self.prelu = nn.Identity() if linear else nn.PReLU(outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.prelu(self.bn(self.conv(x)))


class InvertedResidual(nn.Module):
    """Expand, filter each channel, project; with the input added where the shapes allow."""

    def __init__(self, inputs: int, outputs: int, stride: int, expansion: int) -> None:
        super().__init__()
        wide = inputs * expansion
        self.conv = nn.Sequential(
            nn.Conv2d(inputs, wide, 1, bias=False),
            nn.BatchNorm2d(wide),
            nn.PReLU(wide),
            nn.Conv2d(wide, wide, 3, stride, 1, groups=wide, bias=False),
            nn.BatchNorm2d(wide),
            nn.PReLU(wide),
            nn.Conv2d(wide, outputs, 1, bias=False),
            nn.BatchNorm2d(outputs),
        )
        self.add = Add() if stride == 1 and inputs == outputs else None

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        return y if self.add is None else self.add(x, y)
