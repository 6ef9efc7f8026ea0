"""GoogLeNet as Caffe has it: biased convolutions and 5x5 filters; with batch norms for its two response normalizations."""

from __future__ import annotations

from collections import OrderedDict

from torch import Tensor, nn

from qexp.models.modules import Concat

# of each Inception block: its input, 1x1, 3x3 (before, filters), 5x5 (before, filters), behind the pool
STAGES = {
    3: ((192, 64, 96, 128, 16, 32, 32), (256, 128, 128, 192, 32, 96, 64)),
    4: (
        (480, 192, 96, 208, 16, 48, 64),
        (512, 160, 112, 224, 24, 64, 64),
        (512, 128, 128, 256, 24, 64, 64),
        (512, 112, 144, 288, 32, 64, 64),
        (528, 256, 160, 320, 32, 128, 128),
    ),
    5: ((832, 256, 160, 320, 32, 128, 128), (832, 384, 192, 384, 48, 128, 128)),
}


class GoogLeNetBVLC(nn.Module):
    """Scores `[N, classes]` of images `[N, 3, 224, 224]`, without auxiliary heads.

    torchvision's GoogLeNet is another network: bias-free convolutions, each with a batch norm, and 3x3 filters in the 5x5 branch. Here
    only the 7x7 and the 3x3 convolution before the Inception blocks have a batch norm, where the published network has its local
    response normalization.

    Args:
        num_classes: Outputs.
        dropout: Before the classifier.

    Source: Szegedy et al. 2014 (arXiv 1409.4842), table 1, in the form CNN Activation Quantization (CAQ) quantizes.
    """

    def __init__(self, num_classes: int = 1000, dropout: float = 0.4) -> None:
        super().__init__()
        self.conv1 = _unit(3, 64, 7, stride=2, norm=True)
        self.pool1 = nn.MaxPool2d(3, 2, ceil_mode=True)
        self.conv2 = _unit(64, 64, 1)
        self.conv3 = _unit(64, 192, 3, norm=True)
        self.pool2 = nn.MaxPool2d(3, 2, ceil_mode=True)
        for stage, blocks in STAGES.items():
            if stage > 3:
                setattr(self, f"pool{stage - 1}", nn.MaxPool2d(3, 2, ceil_mode=True))
            for letter, widths in zip("abcde", blocks):
                setattr(self, f"inception{stage}{letter}", Inception(*widths))
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.dropout = nn.Dropout(dropout)
        self.fc = nn.Linear(1024, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        for name, module in self.named_children():
            x = module(x.flatten(1) if name == "dropout" else x)
        return x


class Inception(nn.Module):
    """Filters of 1x1, 3x3 and 5x5 and a pool side by side; the last three narrowed by 1x1 filters."""

    def __init__(self, inputs: int, one: int, before3: int, three: int, before5: int, five: int, pooled: int) -> None:
        super().__init__()
        self.branch1 = _unit(inputs, one, 1)
        self.branch2 = nn.Sequential(_unit(inputs, before3, 1), _unit(before3, three, 3))
        self.branch3 = nn.Sequential(_unit(inputs, before5, 1), _unit(before5, five, 5))
        self.branch4 = nn.Sequential(nn.MaxPool2d(3, 1, 1, ceil_mode=True), _unit(inputs, pooled, 1))
        self.concat = Concat()

    def forward(self, x: Tensor) -> Tensor:
        return self.concat(self.branch1(x), self.branch2(x), self.branch3(x), self.branch4(x))


def _unit(inputs: int, outputs: int, kernel: int, stride: int = 1, norm: bool = False) -> nn.Sequential:
    conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2)
    nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
    nn.init.zeros_(conv.bias)
    parts = {"conv": conv, **({"bn": nn.BatchNorm2d(outputs)} if norm else {}), "relu": nn.ReLU()}
    return nn.Sequential(OrderedDict(parts))
