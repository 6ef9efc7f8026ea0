"""Residual networks for one-bit convolutions: inputs of a sign have both signs, and a shortcut skips each convolution.

Source: Liu et al. 2018, "Bi-Real Net" (arXiv 1808.00278); the three stages for 32x32 images: He et al. 2015 (arXiv 1512.03385),
section 4.2.
"""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path
from typing import Literal

from torch import Tensor, nn

from qexp.errors import QexpError
from qexp.models.activations import ACTIVATIONS
from qexp.models.cifar_resnet import CifarResNet
from qexp.models.modules import Add, StridedPad, conv_bn
from qexp.models.weights import load_weights

Activation = Literal["hardtanh", "prelu", "rprelu", "maxout", "relu"]
Down = Literal["strided_zero", "avg_zero", "avg_conv"]
_ALLOWED = {
    "activation": tuple(ACTIVATIONS),
    "shortcut_span": ("conv", "block"),
    "shortcut_down": ("strided_zero", "avg_zero", "avg_conv"),
}
# names in an ordinary network's file; its shortcuts are not loaded, since they may differ here
_PLAIN = {r"\.(shortcut|downsample)\.": None, r"^fc\.": "linear."}


class PooledPad(nn.Sequential):
    """Means of 2x2 pixels instead of every second one, and zero channels on each side."""

    def __init__(self, channels: int, stride: int) -> None:
        super().__init__(OrderedDict(pool=nn.AvgPool2d(stride), pad=StridedPad(channels, 1)))


def _shortcut(down: Down, in_channels: int, channels: int, stride: int) -> nn.Module:
    if stride == 1 and in_channels == channels:
        return nn.Identity()
    if down == "avg_conv":
        return nn.Sequential(nn.AvgPool2d(stride), *conv_bn(in_channels, channels, 1, 1))
    return (StridedPad if down == "strided_zero" else PooledPad)(channels - in_channels, stride)


class BiRealBlock(nn.Module):
    """Two convolutions with batch norm, each within a residual sum of its own (or one sum around both), each followed by an activation."""

    def __init__(
        self, in_channels: int, channels: int, stride: int, activation: Activation, span: str, down: Down
    ) -> None:
        super().__init__()
        make = ACTIVATIONS[activation]
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.add1 = Add() if span == "conv" else None
        self.act1 = make(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.add2 = Add()
        self.act2 = make(channels)
        self.shortcut = _shortcut(down, in_channels, channels, stride)

    def forward(self, x: Tensor) -> Tensor:
        skipped = self.shortcut(x)
        y = self.bn1(self.conv1(x))
        if self.add1 is not None:
            y = skipped = self.act1(self.add1(y, skipped))
        else:
            y = self.act1(y)
        return self.act2(self.add2(self.bn2(self.conv2(y)), skipped))


class BiRealResNet(nn.Module):
    """Class scores `[N, num_classes]` of images `[N, in_channels, H, W]`: a ResNet of `6n + 2` layers in the order of Bi-Real Net.

    `y = act(BN(conv(x)) + shortcut(x))` around every convolution, so that the residual stream is never reduced to a sign. Names of
    convolutions, batch norms and classifier are those of `CifarResNet`.

    Args:
        depth: 6n + 2: 8, 14, 20, 32, ...
        num_classes: Outputs of the classifier.
        in_channels: Channels of the images.
        activation: `hardtanh` (IR-Net, ReCU), `prelu`, `rprelu` (ReActNet), `maxout` (AdaBin), `relu`. After a ReLU nothing is
            negative: the sign of the next layer carries no information, unless a learned shift is between.
        shortcut_span: `conv` sums around each convolution; `block` around two, as ordinary residual networks do.
        shortcut_down: Where the shape changes: `strided_zero` takes every second pixel and adds zero channels (IR-Net, AdaBin), `avg_zero`
            averages 2x2 pixels first (ReCU), `avg_conv` averages and convolves 1x1 with a batch norm (Bi-Real Net, ReActNet).
        bn_before_classifier: A batch norm between pooling and classifier (IR-Net).
        start: File of a trained plain residual network of this depth (`CifarResNet`) whose convolutions, batch norms and classifier the
            training starts from. It was trained in another order of layers, so that before any training the accuracy is that of chance.

    Raises:
        QexpError: An option that is not allowed, or a `start` that does not fit.
    """

    widths = (16, 32, 64)

    def __init__(
        self,
        depth: int = 20,
        num_classes: int = 10,
        in_channels: int = 3,
        activation: Activation = "rprelu",
        shortcut_span: Literal["conv", "block"] = "conv",
        shortcut_down: Down = "avg_zero",
        bn_before_classifier: bool = False,
        start: str | None = None,
    ) -> None:
        super().__init__()
        if depth < 8 or (depth - 2) % 6:
            raise QexpError(f"BiRealResNet: depth={depth} is not allowed; use 6n + 2 with n >= 1 (8, 14, 20, 32, ...)")
        for name, got in (
            ("activation", activation),
            ("shortcut_span", shortcut_span),
            ("shortcut_down", shortcut_down),
        ):
            if got not in _ALLOWED[name]:
                raise QexpError(f"BiRealResNet: {name}={got!r} is not allowed; use {', '.join(_ALLOWED[name])}")
        self.depth = depth
        channels = self.widths[0]
        self.conv1 = nn.Conv2d(in_channels, channels, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.act0 = ACTIVATIONS[activation](channels)
        for number, width in enumerate(self.widths, start=1):
            blocks = []
            for i in range((depth - 2) // 6):
                stride = 2 if number > 1 and i == 0 else 1
                blocks.append(BiRealBlock(channels, width, stride, activation, shortcut_span, shortcut_down))
                channels = width
            setattr(self, f"layer{number}", nn.Sequential(*blocks))
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.flatten = nn.Flatten()
        self.tail = nn.BatchNorm1d(channels) if bn_before_classifier else nn.Identity()
        self.linear = nn.Linear(channels, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        if start is not None:
            self._start_from(Path(start))

    def forward(self, x: Tensor) -> Tensor:
        x = self.act0(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.linear(self.tail(self.flatten(self.pool(x))))

    def _start_from(self, path: Path) -> None:
        """Loads the weights of an ordinary residual network; only activations, shortcuts and the last norm may be new."""
        if not path.is_file():
            raise QexpError(
                f"BiRealResNet: start={path} is not a file; name the weights of a CifarResNet of the same depth"
            )
        plain = CifarResNet(self.depth, "A", self.linear.out_features)
        plain.conv1 = nn.Conv2d(self.conv1.in_channels, self.conv1.out_channels, 3, padding=1, bias=False)
        try:
            load_weights(plain, path, _PLAIN)
        except QexpError as error:
            raise QexpError(f"BiRealResNet: start={path} does not fit: {error}") from None
        found = plain.state_dict()
        own = {key: value.shape for key, value in self.state_dict().items()}
        foreign = [key for key, value in found.items() if own.get(key) != value.shape]
        if foreign:
            raise QexpError(f"BiRealResNet: start={path} does not fit: {foreign[0]} has no place here")
        self.load_state_dict(found, strict=False)
