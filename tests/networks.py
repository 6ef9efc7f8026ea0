"""Tiny networks that hold the cases surgery and calibration must get right."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qexp.models.modules import Add, Concat


class Residual(nn.Module):
    """Scores [N, 5] of images [N, 3, 8, 8]: stem, a depthwise and a grouped convolution, a residual add, a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(8)
        self.relu1 = nn.ReLU()
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False)
        self.bn2 = nn.BatchNorm2d(8)
        self.relu2 = nn.ReLU()
        self.grouped = nn.Conv2d(8, 8, 1, groups=2)
        self.bn3 = nn.BatchNorm2d(8)
        self.add = Add()
        self.relu3 = nn.ReLU()
        self.conv = nn.Conv2d(8, 12, 3, stride=2)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(12, 5)
        for bn in (self.bn1, self.bn2, self.bn3):  # statistics that folding cannot ignore
            nn.init.uniform_(bn.weight, 0.5, 1.5)
            nn.init.uniform_(bn.bias, -0.3, 0.3)
            nn.init.uniform_(bn.running_mean, -0.2, 0.2)
            nn.init.uniform_(bn.running_var, 0.5, 2.0)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu1(self.bn1(self.stem(x)))
        y = self.relu2(self.bn2(self.depthwise(x)))
        y = self.bn3(self.grouped(y))
        x = self.relu3(self.add(y, x))
        x = self.pool(self.conv(x))
        return self.fc(x.flatten(1))


class Mixed(nn.Module):
    """Scores [N, 4] of images [N, 3, 8, 8] through the layer types `Residual` lacks; `act` runs twice, on two tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.ConvTranspose2d(3, 6, 2, stride=2, groups=3)
        self.norm = nn.BatchNorm2d(6)
        self.act = nn.ReLU()
        self.shrink = nn.Conv2d(6, 6, 3, stride=2, padding=1)
        self.concat = Concat()
        self.silu, self.hardswish, self.prelu, self.relu6 = nn.SiLU(), nn.Hardswish(), nn.PReLU(), nn.ReLU6()
        self.avg, self.max = nn.AvgPool2d(2), nn.MaxPool2d(2)
        self.line = nn.Conv1d(12, 4, 3)
        self.pool = nn.AdaptiveAvgPool2d(1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.norm(self.up(x)))
        x = self.act(self.shrink(x) * 10)
        x = self.concat(self.silu(x), self.hardswish(x))
        x = self.relu6(self.prelu(self.avg(x)))
        x = self.line(self.max(x).flatten(2))
        return self.pool(x[..., None]).flatten(1)


class Bypassed(nn.Module):
    """A network that reads the weight of `hidden` without calling the layer, as attention modules do."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 6)
        self.hidden = nn.Linear(6, 6)
        self.last = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.first(x))
        x = nn.functional.linear(x, self.hidden.weight)
        return self.last(torch.relu(x))


class Tied(nn.Module):
    """Two names, one layer; and two layers, one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(6, 6)
        self.b = self.a
        self.c = nn.Linear(6, 6)
        self.c.weight = self.a.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.c(torch.relu(self.b(torch.relu(self.a(x)))))


class FunctionalBlock(nn.Module):
    """A residual block written with functions."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(channels, channels, 3, padding=1), nn.BatchNorm2d(channels)
        self.conv2, self.bn2 = nn.Conv2d(channels, channels, 3, padding=1), nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu6(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        y += x
        return F.relu(y)


class FunctionalDigits(nn.Module):
    """Scores [N, 10] of digits [N, 1, 8, 8]: sums, activations, a concatenation and a pool that are functions."""

    def __init__(self, num_classes: int = 10) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8)
        self.left, self.right, self.fc = FunctionalBlock(8), FunctionalBlock(8), nn.Linear(16, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.stem(x)))
        x = torch.cat([self.left(x), self.right(x)], 1)
        return self.fc(torch.flatten(F.adaptive_avg_pool2d(x, 1), 1))
