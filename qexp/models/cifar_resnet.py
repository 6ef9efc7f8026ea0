"""Residual networks for 32x32 images: three stages of `(depth - 2) / 6` basic blocks, or `(depth - 2) / 9` bottlenecks.

Source: He, Zhang, Ren, Sun 2015, arXiv:1512.03385, section 4.2; pre-activation: the same authors 2016,
arXiv:1603.05027.
"""

from collections.abc import Sequence
from typing import Literal

from torch import Tensor, nn

from qexp.errors import QexpError
from qexp.models.modules import Add, StridedPad, conv_bn

Shortcut = Literal["A", "B"]
EXPANSION = 4  # channels of a bottleneck's result for one of its 3x3 convolution


def _shortcut(kind: Shortcut, in_channels: int, channels: int, stride: int) -> nn.Module:
    if stride == 1 and in_channels == channels:
        return nn.Identity()
    return StridedPad(channels - in_channels, stride) if kind == "A" else conv_bn(in_channels, channels, 1, stride)


def _conv3x3(in_channels: int, channels: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(in_channels, channels, 3, stride, padding=1, bias=False)


class BasicBlock(nn.Module):
    """conv, BN, ReLU, conv, BN, the sum with the shortcut, and a ReLU if `relu_after_add`."""

    def __init__(
        self, in_channels: int, channels: int, stride: int, shortcut: Shortcut, relu_after_add: bool = True
    ) -> None:
        super().__init__()
        self.conv1 = _conv3x3(in_channels, channels, stride)
        self.bn1 = nn.BatchNorm2d(channels)
        self.relu1 = nn.ReLU()
        self.conv2 = _conv3x3(channels, channels)
        self.bn2 = nn.BatchNorm2d(channels)
        self.shortcut = _shortcut(shortcut, in_channels, channels, stride)
        self.add = Add()
        self.relu2 = nn.ReLU() if relu_after_add else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(self.relu1(self.bn1(self.conv1(x)))))
        return self.relu2(self.add(y, self.shortcut(x)))


class PreActBlock(nn.Module):
    """BN, ReLU, conv, BN, ReLU, conv, and the sum with the shortcut of the block's input.

    Differs from Quantized_ResNet: its shortcut B is a convolution alone, of the result of the block's first ReLU. Here it is a convolution
    of the block's input, with a batch norm.
    """

    def __init__(self, in_channels: int, channels: int, stride: int, shortcut: Shortcut) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.relu1 = nn.ReLU()
        self.conv1 = _conv3x3(in_channels, channels, stride)
        self.bn2 = nn.BatchNorm2d(channels)
        self.relu2 = nn.ReLU()
        self.conv2 = _conv3x3(channels, channels)
        self.shortcut = _shortcut(shortcut, in_channels, channels, stride)
        self.add = Add()

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv1(self.relu1(self.bn1(x)))
        return self.add(self.conv2(self.relu2(self.bn2(y))), self.shortcut(x))


class Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolutions, the last with four times the channels; with batch norms and ReLUs as `BasicBlock` has them."""

    def __init__(
        self, in_channels: int, channels: int, stride: int, shortcut: Shortcut, relu_after_add: bool = True
    ) -> None:
        super().__init__()
        inner = channels // EXPANSION
        self.conv1 = nn.Conv2d(in_channels, inner, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(inner)
        self.relu1 = nn.ReLU()
        self.conv2 = _conv3x3(inner, inner, stride)
        self.bn2 = nn.BatchNorm2d(inner)
        self.relu2 = nn.ReLU()
        self.conv3 = nn.Conv2d(inner, channels, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(channels)
        self.shortcut = _shortcut(shortcut, in_channels, channels, stride)
        self.add = Add()
        self.relu3 = nn.ReLU() if relu_after_add else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu1(self.bn1(self.conv1(x)))
        y = self.bn3(self.conv3(self.relu2(self.bn2(self.conv2(y)))))
        return self.relu3(self.add(y, self.shortcut(x)))


class PreActBottleneck(nn.Module):
    """`Bottleneck` with batch norm and ReLU before each convolution and the shortcut of `PreActBlock`."""

    def __init__(self, in_channels: int, channels: int, stride: int, shortcut: Shortcut) -> None:
        super().__init__()
        inner = channels // EXPANSION
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.relu1 = nn.ReLU()
        self.conv1 = nn.Conv2d(in_channels, inner, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(inner)
        self.relu2 = nn.ReLU()
        self.conv2 = _conv3x3(inner, inner, stride)
        self.bn3 = nn.BatchNorm2d(inner)
        self.relu3 = nn.ReLU()
        self.conv3 = nn.Conv2d(inner, channels, 1, bias=False)
        self.shortcut = _shortcut(shortcut, in_channels, channels, stride)
        self.add = Add()

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv1(self.relu1(self.bn1(x)))
        y = self.conv2(self.relu2(self.bn2(y)))
        return self.add(self.conv3(self.relu3(self.bn3(y))), self.shortcut(x))


class CifarResNet(nn.Module):
    """Class scores [N, num_classes] of images [N, 3, 32, 32].

    Args:
        depth: 6n + 2: 20, 32, 44, 56, 110, ...; of bottlenecks 9n + 2: 29, 164, 1001, ...
        shortcut: Where the shape changes: `A` strided identity with zero channels, `B` 1x1 convolution with BN.
        num_classes: Outputs of the classifier.
        post_add_relu: A ReLU after every block's sum (`true`), after the last sum of each stage (`stage`), or none
            (`false`: the block is then linear after the sum unless a quantizer clips there).
        pre_activation: BN and ReLU before each convolution, none after the sum; `post_add_relu` does not apply.
        stem_channels: Outputs of the first convolution; by default those of the first stage.
        pool: Side of the average pooling window; the classifier reads all windows of the 8x8 map.
        bottleneck: Blocks of 1x1, 3x3 and 1x1 convolutions, whose results have four times the channels of a basic block's.
        init: Weights of the convolutions: `he_normal` by fan-out, or `kaiming_uniform` by fan-in as PACT-Quantization has it.
    """

    widths = (16, 32, 64)

    def __init__(
        self,
        depth: int = 20,
        shortcut: Shortcut = "A",
        num_classes: int = 10,
        post_add_relu: bool | Literal["stage"] = True,
        pre_activation: bool = False,
        stem_channels: int | None = None,
        pool: int = 8,
        init: Literal["he_normal", "kaiming_uniform"] = "he_normal",
        bottleneck: bool = False,
    ) -> None:
        super().__init__()
        _check(depth, shortcut, post_add_relu, pool, init, bottleneck)
        stem = self.widths[0] if stem_channels is None else stem_channels
        widths = [EXPANSION * width for width in self.widths] if bottleneck else self.widths
        if shortcut == "A" and stem > widths[0]:
            raise QexpError(f"CifarResNet: shortcut A cannot go from {stem} stem channels down to {widths[0]}; use B")
        self.conv1 = _conv3x3(3, stem)
        self.bn1 = nn.Identity() if pre_activation else nn.BatchNorm2d(stem)
        self.relu1 = nn.Identity() if pre_activation else nn.ReLU()
        channels, count = stem, (depth - 2) // (9 if bottleneck else 6)
        before, after = (PreActBottleneck, Bottleneck) if bottleneck else (PreActBlock, BasicBlock)
        for number, width in enumerate(widths, start=1):
            blocks = []
            for i in range(count):
                shape = (channels, width, 2 if number > 1 and i == 0 else 1, shortcut)
                last = i == count - 1
                relu = last if post_add_relu == "stage" else bool(post_add_relu)
                blocks.append(before(*shape) if pre_activation else after(*shape, relu_after_add=relu))
                channels = width
            setattr(self, f"layer{number}", nn.Sequential(*blocks))
        self.tail = nn.Sequential(nn.BatchNorm2d(channels), nn.ReLU()) if pre_activation else nn.Identity()
        self.pool = nn.AvgPool2d(pool)
        self.flatten = nn.Flatten()
        self.linear = nn.Linear(channels * (8 // pool) ** 2, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                if init == "he_normal":
                    nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
                else:
                    nn.init.kaiming_uniform_(module.weight, mode="fan_in", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu1(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.linear(self.flatten(self.pool(self.tail(x))))


def _check(depth: int, shortcut: str, post_add_relu: bool | str, pool: int, init: str, bottleneck: bool) -> None:
    def allow(name: str, got: object, allowed: Sequence[object]) -> None:
        if got not in allowed:
            raise QexpError(f"CifarResNet: {name}={got!r} is not allowed; use {', '.join(map(str, allowed))}")

    if bottleneck and (depth < 11 or (depth - 2) % 9):
        raise QexpError(
            f"CifarResNet: depth={depth} is not allowed; with bottlenecks use 9n + 2 with n >= 1 (11, 29, 164, 1001, ...)"
        )
    if not bottleneck and (depth < 8 or (depth - 2) % 6):
        raise QexpError(
            f"CifarResNet: depth={depth} is not allowed; use 6n + 2 with n >= 1 (8, 14, 20, 32, 44, 56, 110, ...)"
        )
    allow("shortcut", shortcut, ("A", "B"))
    allow("post_add_relu", post_add_relu, (True, False, "stage"))
    allow("pool", pool, (1, 2, 4, 8))
    allow("init", init, ("he_normal", "kaiming_uniform"))
