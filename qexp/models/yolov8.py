"""YOLOv8: a detector without anchors; split and joined blocks, SiLU, doubled maps, one head for boxes and one for classes."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor, nn

from qexp.errors import QexpError
from qexp.models.aligned import AlignedBoxes
from qexp.models.detector import Detector
from qexp.models.modules import Add, Concat

# depth, width, greatest number of channels: multiples of the published sizes
SIZES = {"n": (1 / 3, 0.25, 1024), "s": (1 / 3, 0.5, 1024), "m": (2 / 3, 0.75, 768)}
STRIDES = (8, 16, 32)


class ConvBnSiLU(nn.Module):
    """Convolution, batch norm, SiLU: `[N, C, H, W] -> [N, outputs, H / stride, W / stride]`."""

    def __init__(self, channels: int, outputs: int, kernel: int = 1, stride: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, outputs, kernel, stride, kernel // 2, bias=False)
        self.bn = nn.BatchNorm2d(outputs, eps=1e-3, momentum=0.03)
        self.act = nn.SiLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.bn(self.conv(x)))


class Bottleneck(nn.Module):
    """Two 3x3 convolutions, and the input added where `shortcut`; shapes stay."""

    def __init__(self, channels: int, shortcut: bool) -> None:
        super().__init__()
        self.cv1, self.cv2 = ConvBnSiLU(channels, channels, 3), ConvBnSiLU(channels, channels, 3)
        self.add = Add() if shortcut else None

    def forward(self, x: Tensor) -> Tensor:
        y = self.cv2(self.cv1(x))
        return y if self.add is None else self.add(x, y)


class C2f(nn.Module):
    """Splits the channels in two, passes one half through `n` bottlenecks, joins both halves and every bottleneck's result.

    Source: cross-stage partial blocks (Wang et al. 2019, arXiv:1911.11929) in the form of YOLOv8.
    """

    def __init__(self, channels: int, outputs: int, n: int, shortcut: bool) -> None:
        super().__init__()
        half = outputs // 2
        self.cv1, self.cv2 = ConvBnSiLU(channels, 2 * half), ConvBnSiLU((2 + n) * half, outputs)
        self.m = nn.ModuleList(Bottleneck(half, shortcut) for _ in range(n))
        self.cat = Concat()

    def forward(self, x: Tensor) -> Tensor:
        parts = list(self.cv1(x).chunk(2, 1))
        for block in self.m:
            parts.append(block(parts[-1]))
        return self.cv2(self.cat(*parts))


class SPPF(nn.Module):
    """Three max pools of 5x5 one after the other, joined with their input: pools of 5, 9 and 13 pixels. Shapes stay."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.cv1, self.cv2 = ConvBnSiLU(channels, channels // 2), ConvBnSiLU(2 * channels, channels)
        self.m1, self.m2, self.m3 = (nn.MaxPool2d(5, 1, 2) for _ in range(3))
        self.cat = Concat()

    def forward(self, x: Tensor) -> Tensor:
        x = self.cv1(x)
        one = self.m1(x)
        two = self.m2(one)
        return self.cv2(self.cat(x, one, two, self.m3(two)))


class YOLOv8(Detector):
    """YOLOv8's network: `[N, 3, H, W] -> [N, P, 4 * 16 + classes]`, P cells of the maps at 1/8, 1/16 and 1/32.

    The backbone's three maps are joined upwards (doubled and joined with the map before) and downwards; each of the three results goes
    through two heads of three convolutions, one for the distances of the four sides and one for the classes.

    Source: written from published descriptions of the architecture; see `AlignedBoxes` for the boxes and the training.
    Differs from the paper: the released code fixes no input size and starts from weights trained on COCO.

    Args:
        num_classes: Number of classes.
        size: `n`, `s` or `m`.
        pixels: Height and width of the input, multiples of 32.
    """

    def __init__(self, num_classes: int = 20, size: str = "n", pixels: Sequence[int] = (320, 320)) -> None:
        super().__init__()
        if size not in SIZES:
            raise QexpError(f"model.net.size={size} is not allowed; use {', '.join(SIZES)}")
        if any(side % 32 or side <= 0 for side in pixels):
            raise QexpError(
                f"model.input_size: {list(pixels)} pixels are not allowed; use multiples of 32, such as 320"
            )
        depth, width, most = SIZES[size]

        def channels(full: int) -> int:
            return math.ceil(min(full, most) * width / 8) * 8

        def repeats(full: int) -> int:
            return max(round(full * depth), 1)

        c1, c2, c3, c4, c5 = (channels(full) for full in (64, 128, 256, 512, 1024))
        self.stem = ConvBnSiLU(3, c1, 3, 2)
        self.stage2 = nn.Sequential(ConvBnSiLU(c1, c2, 3, 2), C2f(c2, c2, repeats(3), True))
        self.stage3 = nn.Sequential(ConvBnSiLU(c2, c3, 3, 2), C2f(c3, c3, repeats(6), True))
        self.stage4 = nn.Sequential(ConvBnSiLU(c3, c4, 3, 2), C2f(c4, c4, repeats(6), True))
        self.stage5 = nn.Sequential(ConvBnSiLU(c4, c5, 3, 2), C2f(c5, c5, repeats(3), True), SPPF(c5))
        self.up4, self.cat4, self.join4 = nn.Upsample(scale_factor=2), Concat(), C2f(c5 + c4, c4, repeats(3), False)
        self.up3, self.cat3, self.join3 = nn.Upsample(scale_factor=2), Concat(), C2f(c4 + c3, c3, repeats(3), False)
        self.down4, self.cat5 = ConvBnSiLU(c3, c3, 3, 2), Concat()
        self.merge4 = C2f(c3 + c4, c4, repeats(3), False)
        self.down5, self.cat6 = ConvBnSiLU(c4, c4, 3, 2), Concat()
        self.merge5 = C2f(c4 + c5, c5, repeats(3), False)
        cells = [(pixels[0] // stride, pixels[1] // stride) for stride in STRIDES]
        self.decoder = AlignedBoxes(cells, bins=16, classes=num_classes)
        boxes, kinds = max(16, c3 // 4, 64), max(c3, min(num_classes, 100))
        self.place = nn.ModuleList(_head(c, boxes, 4 * 16) for c in (c3, c4, c5))
        self.kind = nn.ModuleList(_head(c, kinds, num_classes) for c in (c3, c4, c5))
        self.row, self.rows = nn.ModuleList(Concat() for _ in STRIDES), Concat(2)
        for place, kind, (down, across) in zip(self.place, self.kind, cells):
            nn.init.ones_(place[-1].bias)
            nn.init.constant_(kind[-1].bias, math.log(5 / num_classes / (down * across)))  # few objects per image

    def forward(self, x: Tensor) -> Tensor:
        p3 = self.stage3(self.stage2(self.stem(x)))
        p4 = self.stage4(p3)
        p5 = self.stage5(p4)
        j4 = self.join4(self.cat4(self.up4(p5), p4))
        j3 = self.join3(self.cat3(self.up3(j4), p3))
        m4 = self.merge4(self.cat5(self.down4(j3), j4))
        m5 = self.merge5(self.cat6(self.down5(m4), p5))
        rows = []
        for y, place, kind, row in zip((j3, m4, m5), self.place, self.kind, self.row):
            rows.append(row(place(y), kind(y)).flatten(2))
        return self.rows(*rows).transpose(1, 2)

    def decode(self, raw: Tensor) -> tuple[Tensor, Tensor]:
        return self.decoder.decode(raw)

    def loss(self, raw: Tensor, boxes: Sequence[Tensor], labels: Sequence[Tensor]) -> Tensor:
        return self.decoder.loss(raw, boxes, labels)


def _head(channels: int, middle: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(ConvBnSiLU(channels, middle, 3), ConvBnSiLU(middle, middle, 3), nn.Conv2d(middle, outputs, 1))
