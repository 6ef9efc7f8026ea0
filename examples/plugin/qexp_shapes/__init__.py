"""A network, a quantizer, a range rule and a data set of one's own; `conf/` beside this file names them for the command line."""

import torch
from torch import nn

from qexp.data.base import Arrays, ImageData
from qexp.quantizers.base import GridQuantizer


def net(num_classes: int = 2, width: int = 8) -> nn.Module:
    """Returns a network for 16x16 grey images."""
    first = [nn.Conv2d(1, width, 3, stride=2, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
    return nn.Sequential(
        *first, nn.Conv2d(width, width, 3), nn.ReLU(), nn.Flatten(), nn.Linear(25 * width, num_classes)
    )


class Clipped(GridQuantizer):
    """Even levels, `2^bits - 1` of them, that reach a share of the greatest magnitude: the simplest clip."""

    bits_allowed = (2, 16)

    def __init__(self, bits, shape=(1,), *, reach=0.9, **common):
        super().__init__(bits, shape, **common)
        self.reach = reach
        self.hold_scale()

    @property
    def limits(self):
        return 1 - 2 ** (self.bits - 1), 2 ** (self.bits - 1) - 1

    def fit(self, stats, followed_by_relu=False):
        most = stats.min.abs().maximum(stats.max.abs())
        self.put(scale=(self.reach * most / self.limits[1]).clamp_min(1e-30))
        self.mark_ready()


def rms(stats, grid, context, k=3.0):
    """Returns the range of `k` root mean squares, no wider than the observed values."""
    wide = k * (stats.mean.square() + stats.std.square()).sqrt()
    return (-wide).maximum(stats.min), wide.minimum(stats.max)


class Shapes(ImageData):
    """Squares and crosses, drawn at random places in noise: two classes, 600 training and 200 test images `[1, 16, 16]`."""

    num_classes, class_names = 2, ("square", "cross")

    def read(self):
        random = torch.Generator().manual_seed(0)
        images, labels = torch.randint(0, 60, (800, 1, 16, 16), generator=random), torch.arange(800) % 2
        for image, label, (y, x) in zip(images, labels, torch.randint(0, 8, (800, 2), generator=random)):
            part = image[0, y : y + 8, x : x + 8]
            part[2:6, 2:6] += 150 * (1 - label)
            part[3:5] += 150 * label
            part[:, 3:5] += 150 * label
        images = images.clamp(max=255).byte()
        return Arrays(images[:600], labels[:600], images[600:], labels[600:])
