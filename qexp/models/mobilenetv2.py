"""MobileNetV2 for 32x32 images.

Source: Sandler, Howard, Zhu, Zhmoginov, Chen 2018, arXiv:1801.04381.
Differs from the paper: strides fit 32x32 images, shortcuts hold convolutions, and the first block expands too (by 1).
"""

from typing import Literal

from torch import Tensor, nn

from qexp.errors import QexpError
from qexp.models.modules import Add, conv_bn

Shortcut = Literal["all", "changed"]


class InvertedBottleneck(nn.Module):
    """1x1 expansion, depthwise 3x3, linear 1x1 projection; at stride 1 the sum with a shortcut.

    The shortcut is a 1x1 convolution with BN, in `changed` only where the channel count changes, else the identity.
    """

    def __init__(self, in_channels: int, channels: int, expansion: int, stride: int, shortcut: Shortcut) -> None:
        super().__init__()
        hidden = in_channels * expansion
        self.conv1 = nn.Conv2d(in_channels, hidden, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(hidden)
        self.relu1 = nn.ReLU6()
        self.conv2 = nn.Conv2d(hidden, hidden, 3, stride, padding=1, groups=hidden, bias=False)
        self.bn2 = nn.BatchNorm2d(hidden)
        self.relu2 = nn.ReLU6()
        self.conv3 = nn.Conv2d(hidden, channels, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(channels)
        self.residual = stride == 1
        if self.residual:
            plain = shortcut == "changed" and in_channels == channels
            self.shortcut = nn.Identity() if plain else conv_bn(in_channels, channels)
            self.add = Add()

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu1(self.bn1(self.conv1(x)))
        y = self.relu2(self.bn2(self.conv2(y)))
        y = self.bn3(self.conv3(y))
        return self.add(y, self.shortcut(x)) if self.residual else y


class MobileNetV2(nn.Module):
    """Class scores [N, num_classes] of images [N, 3, 32, 32]: stem, 17 blocks, head, classifier.

    Args:
        shortcut: Which blocks of stride 1 have a convolution in their shortcut: `all`, or where the channel count
            `changed`.
        num_classes: Outputs of the classifier.
    """

    stages = (  # expansion, channels, blocks, stride of the first
        (1, 16, 1, 1),
        (6, 24, 2, 1),
        (6, 32, 3, 2),
        (6, 64, 4, 2),
        (6, 96, 3, 1),
        (6, 160, 3, 2),
        (6, 320, 1, 1),
    )

    def __init__(self, shortcut: Shortcut = "all", num_classes: int = 10) -> None:
        super().__init__()
        if shortcut not in ("all", "changed"):
            raise QexpError(f"MobileNetV2: shortcut={shortcut!r} is not allowed; use all or changed")
        self.conv1 = nn.Conv2d(3, 32, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(32)
        self.relu1 = nn.ReLU()
        blocks, channels = [], 32
        for expansion, width, repeats, stride in self.stages:
            for i in range(repeats):
                blocks.append(InvertedBottleneck(channels, width, expansion, stride if i == 0 else 1, shortcut))
                channels = width
        self.blocks = nn.Sequential(*blocks)
        self.conv2 = nn.Conv2d(channels, 1280, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(1280)
        self.relu2 = nn.ReLU()
        self.pool = nn.AvgPool2d(4)
        self.flatten = nn.Flatten()
        self.linear = nn.Linear(1280, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(self.relu1(self.bn1(self.conv1(x))))
        x = self.relu2(self.bn2(self.conv2(x)))
        return self.linear(self.flatten(self.pool(x)))
