"""ToyNet, a small CIFAR network made to be quantized: few non-linearities, most of them left to its quantizers."""

from torch import Tensor, nn

from qexp.models.modules import Add


class ToyBlock(nn.Module):
    """[N, Cin, H, W] -> [N, C, H / stride, W / stride]: an optional strided BN and convolution, then a residual branch.

    The branch is depthwise 3x3, BN, 1x1 to `expansion` times the channels, ReLU, 1x1 back; nothing follows the sum.
    Quantizers belong on the outputs of `down.conv`, `bn`, `relu` and `add`.
    """

    def __init__(self, in_channels: int, channels: int, stride: int, expansion: int = 4) -> None:
        super().__init__()
        self.down = nn.Sequential()
        if stride != 1 or in_channels != channels:
            self.down.add_module("bn", nn.BatchNorm2d(in_channels))
            self.down.add_module("conv", nn.Conv2d(in_channels, channels, stride, stride, bias=False))
        self.depthwise = nn.Conv2d(channels, channels, 3, padding=1, groups=channels, bias=False)
        self.bn = nn.BatchNorm2d(channels)
        self.expand = nn.Conv2d(channels, expansion * channels, 1, bias=False)
        self.relu = nn.ReLU()
        self.project = nn.Conv2d(expansion * channels, channels, 1, bias=False)
        self.add = Add()

    def forward(self, x: Tensor) -> Tensor:
        x = self.down(x)
        return self.add(self.project(self.relu(self.expand(self.bn(self.depthwise(x))))), x)


class ToyNet(nn.Module):
    """Class scores [N, num_classes] of images [N, 3, 32, 32]: stem, ten blocks in four stages, header, classifier.

    In float the stem, the header and the sums are linear; a clipping quantizer at their outputs is the non-linearity
    the network was designed with.
    """

    stages = ((1, 16, 1), (3, 32, 2), (3, 32, 1), (3, 64, 2))  # blocks, channels, stride of the first

    def __init__(self, num_classes: int = 10, expansion: int = 4) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        blocks, channels = [], 16
        for repeats, width, stride in self.stages:
            for i in range(repeats):
                blocks.append(ToyBlock(channels, width, stride if i == 0 else 1, expansion))
                channels = width
        self.blocks = nn.Sequential(*blocks)
        self.conv2 = nn.Conv2d(channels, 512, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(512)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.flatten = nn.Flatten()
        self.linear = nn.Linear(512, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        nn.init.normal_(self.linear.weight, 0, 0.001)
        nn.init.zeros_(self.linear.bias)

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(self.bn1(self.conv1(x)))
        return self.linear(self.flatten(self.pool(self.bn2(self.conv2(x)))))
