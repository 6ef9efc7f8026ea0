"""SSD detectors: the published one on VGG-16, torchvision's, and one on SqueezeNet for small machines."""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from qexp.errors import QexpError
from qexp.models.detector import Detector
from qexp.models.multibox import Map, MultiBox, priors, ssd300_maps
from qexp.models.operations import UnitLength

VGG16 = (64, 64, "M", 128, 128, "M", 256, 256, 256, "C", 512, 512, 512, "M", 512, 512, 512)


class L2Norm(nn.Module):
    """Each pixel's channels scaled to unit length, times one learned factor per channel: `[N, C, H, W]` -> the same shape.

    Source: Liu, Rabinovich, Berg 2015, arXiv:1506.04579, section 3.3.
    """

    def __init__(self, channels: int, scale: float = 20.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((channels,), scale))
        self.unit = UnitLength(1, eps=1e-10)

    def forward(self, x: Tensor) -> Tensor:
        return self.unit(x) * self.weight[:, None, None]


class SSD300(Detector):
    """SSD300 on VGG-16: `[N, 3, 300, 300] -> [N, 8732, 4 + 1 + classes]`.

    Modules bear the names of the published PyTorch implementation (`vgg`, `L2Norm`, `extras`, `loc`, `conf`), so that its weights load
    as they are; torchvision's load through the key map in conf/model/ssd300_vgg16.yaml.

    Source: Liu et al. 2016, arXiv:1512.02325.

    Args:
        num_classes: Without background.
        sizes: Of the priors: `voc` as published, `torchvision` as torchvision's weights were trained.
    """

    def __init__(self, num_classes: int = 20, sizes: str = "voc") -> None:
        super().__init__()
        self.vgg = nn.ModuleList(_vgg())
        self.L2Norm = L2Norm(512)
        self.extras = nn.ModuleList(extra_layers(1024, ((256, 512, 2), (128, 256, 2), (128, 256, 1), (128, 256, 1))))
        self.activations = nn.ModuleList(nn.ReLU() for _ in self.extras)
        self.loc, self.conf = heads((512, 1024, 512, 256, 256, 256), ssd300_maps(sizes), num_classes)
        self.multibox = MultiBox(priors(ssd300_maps(sizes), clip_centres=sizes == "voc"))
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.vgg[:23]:
            x = layer(x)
        maps = [self.L2Norm(x)]
        for layer in self.vgg[23:]:
            x = layer(x)
        maps.append(x)
        for place, (layer, activation) in enumerate(zip(self.extras, self.activations)):
            x = activation(layer(x))
            if place % 2:
                maps.append(x)
        return rows(maps, self.loc, self.conf)

    def decode(self, raw: Tensor) -> tuple[Tensor, Tensor]:
        return self.multibox.decode(raw)

    def loss(self, raw: Tensor, boxes: Sequence[Tensor], labels: Sequence[Tensor]) -> Tensor:
        return self.multibox.loss(raw, boxes, labels)


class TorchvisionSSD(Detector):
    """torchvision's `ssd300_vgg16` with one tensor in and one out: `[N, 3, 300, 300] -> [N, 8732, 4 + 1 + classes]`.

    Its own resizing and normalisation belong to the data set here, its post-processing to the task. The network is `ssd`; its
    torchvision weights load by name with the key map in conf/model/ssd300_torchvision.yaml.

    Args:
        num_classes: Without background.
    """

    torchvision_name = "ssd300_vgg16"

    def __init__(self, num_classes: int = 20) -> None:
        super().__init__()
        from torchvision.models.detection import ssd300_vgg16
        from torchvision.models.detection.image_list import ImageList

        self.ssd = ssd300_vgg16(weights=None, weights_backbone=None, num_classes=num_classes + 1)
        maps = [torch.zeros(1, 1, one.cells, one.cells, device="cpu") for one in ssd300_maps()]
        image = ImageList(torch.zeros(1, 3, 300, 300, device="cpu"), [(300, 300)])
        with torch.device("cpu"):
            (found,) = self.ssd.anchor_generator(image, maps)
        found = found.double() / 300
        centre = torch.cat([(found[:, :2] + found[:, 2:]) / 2, found[:, 2:] - found[:, :2]], 1)
        self.multibox = MultiBox(centre.float())

    def forward(self, x: Tensor) -> Tensor:
        found = self.ssd.head(list(self.ssd.backbone(x).values()))
        return torch.cat([found["bbox_regression"], found["cls_logits"]], -1)

    def decode(self, raw: Tensor) -> tuple[Tensor, Tensor]:
        return self.multibox.decode(raw)

    def loss(self, raw: Tensor, boxes: Sequence[Tensor], labels: Sequence[Tensor]) -> Tensor:
        return self.multibox.loss(raw, boxes, labels)


class SqueezeSSD(Detector):
    """SSD on SqueezeNet 1.1 at 300 pixels: maps of 37, 18, 9, 5, 3 and 1 cells: `[N, 3, 300, 300] -> [N, P, 4 + 1 + classes]`.

    A small network for small machines and small sets; no published counterpart. Its predicting layers start near 0: SqueezeNet's maps
    are not normalized, and from torch's own start the first losses are tens of times those of a guess.

    Args:
        num_classes: Without background.
        backbone: File with the ImageNet weights of torchvision's `squeezenet1_1` to start from; None starts from random ones.
    """

    def __init__(self, num_classes: int = 20, backbone: str | Path | None = None) -> None:
        super().__init__()
        from qexp.models.zoo import torchvision_model

        self.features = torchvision_model("squeezenet1_1").features
        if backbone is not None:
            _load_features(self.features, Path(backbone))
        self.extras = nn.ModuleList(extra_layers(512, ((128, 256, 2), (64, 128, 2), (64, 128, 2), (64, 128, 1))))
        self.activations = nn.ModuleList(nn.ReLU() for _ in self.extras)
        maps = ssd300_maps(cells=(37, 18, 9, 5, 3, 1))
        self.loc, self.conf = heads((256, 512, 256, 128, 128, 128), maps, num_classes)
        for layer in self.extras:
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
            nn.init.zeros_(layer.bias)
        for layer in (*self.loc, *self.conf):
            nn.init.normal_(layer.weight, std=0.001)
            nn.init.zeros_(layer.bias)
        self.multibox = MultiBox(priors(maps))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.features[:8]:
            x = layer(x)
        maps = [x]
        for layer in self.features[8:]:
            x = layer(x)
        maps.append(x)
        for place, (layer, activation) in enumerate(zip(self.extras, self.activations)):
            x = activation(layer(x))
            if place % 2:
                maps.append(x)
        return rows(maps, self.loc, self.conf)

    def decode(self, raw: Tensor) -> tuple[Tensor, Tensor]:
        return self.multibox.decode(raw)

    def loss(self, raw: Tensor, boxes: Sequence[Tensor], labels: Sequence[Tensor]) -> Tensor:
        return self.multibox.loss(raw, boxes, labels)


def _vgg() -> list[nn.Module]:
    """Returns VGG-16 to conv5_3 (third pool in ceil mode), then pool5, conv6 (dilated) and conv7."""
    layers: list[nn.Module] = []
    channels = 3
    for what in VGG16:
        if isinstance(what, str):
            layers.append(nn.MaxPool2d(2, 2, ceil_mode=what == "C"))
        else:
            layers += [nn.Conv2d(channels, what, 3, padding=1), nn.ReLU()]
            channels = what
    layers += [nn.MaxPool2d(3, 1, 1), nn.Conv2d(512, 1024, 3, padding=6, dilation=6), nn.ReLU()]
    return [*layers, nn.Conv2d(1024, 1024, 1), nn.ReLU()]


def extra_layers(channels: int, widths: Sequence[tuple[int, int, int]]) -> list[nn.Conv2d]:
    """The convolutions behind the backbone: for each (middle, width, stride) a 1x1 and a 3x3 one; stride 1 shrinks by its border."""
    layers = []
    for middle, width, stride in widths:
        layers += [nn.Conv2d(channels, middle, 1), nn.Conv2d(middle, width, 3, stride, padding=int(stride == 2))]
        channels = width
    return layers


def heads(channels: Sequence[int], maps: Sequence[Map], num_classes: int) -> tuple[nn.ModuleList, nn.ModuleList]:
    """The 3x3 convolutions that predict offsets and scores (background first) from each map."""
    pairs = list(zip(channels, maps))
    loc = nn.ModuleList(nn.Conv2d(c, 4 * m.boxes, 3, padding=1) for c, m in pairs)
    return loc, nn.ModuleList(nn.Conv2d(c, (1 + num_classes) * m.boxes, 3, padding=1) for c, m in pairs)


def rows(maps: Sequence[Tensor], loc: nn.ModuleList, conf: nn.ModuleList) -> Tensor:
    """The predictions of all maps `[N, P, 4 + 1 + classes]`, ordered as the priors are."""

    def flat(y: Tensor, numbers: int) -> Tensor:
        return y.permute(0, 2, 3, 1).flatten(1).unflatten(1, (-1, numbers))

    out = []
    for x, place, kind in zip(maps, loc, conf):
        numbers = 4 * kind.out_channels // place.out_channels
        out.append(torch.cat([flat(place(x), 4), flat(kind(x), numbers)], -1))
    return torch.cat(out, 1)


def _load_features(features: nn.Module, path: Path) -> None:
    """Loads a backbone's weights from a classifier's file."""
    if not path.is_file():
        raise QexpError(
            f"{path}: no such file; model.net.backbone names torchvision's squeezenet1_1 weights, null for none"
        )
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        features.load_state_dict(
            {k.removeprefix("features."): v for k, v in state.items() if k.startswith("features.")}
        )
    except (RuntimeError, pickle.UnpicklingError, EOFError, AttributeError) as error:
        raise QexpError(f"{path}: not weights of squeezenet1_1 ({str(error).splitlines()[0]})") from error
