"""A network built from a Darknet `.cfg`, its adds and concatenations as modules."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from qexp.errors import QexpError
from qexp.models.darknet_files import Section, read_cfg, read_weights
from qexp.models.detector import Detector
from qexp.models.modules import Add, Concat
from qexp.models.yolo import Head, Yolo

ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "relu": nn.ReLU,
    "relu6": nn.ReLU6,
    "leaky": lambda: nn.LeakyReLU(0.1),
    "mish": nn.Mish,
    "swish": nn.SiLU,
    "logistic": nn.Sigmoid,
}


class Darknet(Detector):
    """The detector a `.cfg` describes: `[N, 3, H, W] -> [N, P, 5 + classes]`, the rows of all `[yolo]` sections behind each other.

    Section *i* after `[net]` is `layers.i`; a convolution's parts are `layers.i.conv`, `.bn`, `.relu` (or the activation's name), a
    shortcut is `layers.i.add`, a route of several layers `layers.i.concat`.

    Args:
        cfg: The file.
        num_classes: Classes of the data set; the file's own must agree.
        size: Height and width of the input, if they differ from the file's.
    """

    def __init__(self, cfg: str | Path, num_classes: int | None = None, size: Sequence[int] | None = None) -> None:
        super().__init__()
        net, *sections = read_cfg(cfg)
        self.size = tuple(size) if size is not None else (net.whole("height"), net.whole("width"))
        self.layers, self.wiring = nn.ModuleList(), []
        channels, strides, heads = [], [], []
        for place, section in enumerate(sections):
            try:
                make = MAKERS[section.name]
            except KeyError:
                known = ", ".join(sorted(MAKERS))
                raise QexpError(
                    f"{cfg}, line {section.line}: [{section.name}] is not known; known are {known}"
                ) from None
            sources = _sources(section, place)
            came = [channels[s] if s >= 0 else net.whole("channels", 3) for s in sources]
            layer, width, step = make(section, came)
            self.layers.append(layer)
            self.wiring.append(sources)
            channels.append(width)
            strides.append((strides[sources[0]] if sources[0] >= 0 else 1) * step)
            if section.name == "yolo":
                if any(s % strides[-1] for s in self.size):
                    raise QexpError(
                        f"{cfg}: size {list(self.size)}; multiples of {strides[-1]:g} are needed (model.input_size)"
                    )
                heads.append((place, _head(section, [s // strides[-1] for s in self.size], came[0], num_classes)))
        if not heads:
            raise QexpError(f"{cfg}: has no [yolo] section; only detectors are read")
        self.heads = {place: len(head.anchors) for place, head in heads}
        self.kept = {s for at, sources in enumerate(self.wiring) for s in sources if s != at - 1}
        self.yolo = Yolo([head for _, head in heads], (self.size[1], self.size[0]))

    @property
    def weight_readers(self) -> dict[str, Callable[[Path], dict[str, Tensor]]]:
        """Readers of this network's own weight formats, by file ending."""
        parts = [(n, m) for n, m in self.named_modules() if isinstance(m, nn.Conv2d | nn.BatchNorm2d)]
        return {".weights": lambda path: read_weights(path, parts)}

    def forward(self, x: Tensor) -> Tensor:
        kept: dict[int, Tensor] = {-1: x}
        rows = []
        for place, (layer, sources) in enumerate(zip(self.layers, self.wiring)):
            x = layer(*(x if s == place - 1 else kept[s] for s in sources))
            if place in self.kept:
                kept[place] = x
            if place in self.heads:
                rows.append(x.unflatten(1, (self.heads[place], -1)).flatten(3).transpose(2, 3).flatten(1, 2))
        return torch.cat(rows, 1)

    def decode(self, raw: Tensor) -> tuple[Tensor, Tensor]:
        return self.yolo.decode(raw)

    def loss(self, raw: Tensor, boxes: Sequence[Tensor], labels: Sequence[Tensor]) -> Tensor:
        return self.yolo.loss(raw, boxes, labels)


def _sources(section: Section, place: int) -> tuple[int, ...]:
    """Returns the indices of the layers that a section reads; -1 is the image."""
    key = {"route": "layers", "shortcut": "from"}.get(section.name)
    named = [int(v) for v in section.numbers(key)] if key else []
    named = [v if v >= 0 else place + v for v in named]
    if any(not 0 <= v < place for v in named):
        raise QexpError(f"[{section.name}] in line {section.line}: {key}={section.options[key]} names no earlier layer")
    return tuple(named) if section.name == "route" else (place - 1, *named)


def _activation(section: Section) -> dict[str, nn.Module]:
    name = section.options.get("activation", "linear")
    if name == "linear":
        return {}
    if name not in ACTIVATIONS:
        known = ", ".join(("linear", *ACTIVATIONS))
        raise QexpError(f"[{section.name}] in line {section.line}: activation={name} is not allowed; use {known}")
    return {name: ACTIVATIONS[name]()}


def _convolution(section: Section, came: list[int]) -> tuple[nn.Module, int, int]:
    filters, size, stride = section.whole("filters", 1), section.whole("size", 1), section.whole("stride", 1)
    padding = size // 2 if section.whole("pad", 0) else section.whole("padding", 0)
    norm = bool(section.whole("batch_normalize", 0))
    parts: dict[str, nn.Module] = OrderedDict()
    parts["conv"] = nn.Conv2d(came[0], filters, size, stride, padding, groups=section.whole("groups", 1), bias=not norm)
    if norm:
        parts["bn"] = nn.BatchNorm2d(filters, eps=1e-6)  # Darknet divides by sqrt(variance) + 1e-6
    parts.update(_activation(section))
    return nn.Sequential(parts), filters, stride


class Shortcut(nn.Module):
    """The sum of two layers, then the activation of the file's section, if any."""

    def __init__(self, activation: dict[str, nn.Module]) -> None:
        super().__init__()
        self.add = Add()
        self.after = nn.Sequential(OrderedDict(activation))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.after(self.add(x, y))


class Route(nn.Module):
    """Several layers side by side."""

    def __init__(self) -> None:
        super().__init__()
        self.concat = Concat()

    def forward(self, *xs: Tensor) -> Tensor:
        return self.concat(*xs)


def _shortcut(section: Section, came: list[int]) -> tuple[nn.Module, int, int]:
    if len(set(came)) != 1 or len(came) != 2:
        raise QexpError(f"[shortcut] in line {section.line}: adds {came} channels; two layers of one width are needed")
    return Shortcut(_activation(section)), came[0], 1


def _route(section: Section, came: list[int]) -> tuple[nn.Module, int, int]:
    if "groups" in section.options:
        raise QexpError(
            f"[route] in line {section.line}: groups={section.options['groups']}; groups of a layer are not supported"
        )
    return (Route() if len(came) > 1 else nn.Identity()), sum(came), 1


def _maxpool(section: Section, came: list[int]) -> tuple[nn.Module, int, int]:
    size, stride = section.whole("size", 2), section.whole("stride", 2)
    around = section.whole("padding", size - 1)
    parts: dict[str, nn.Module] = OrderedDict()
    if around % 2:  # an odd pixel is added behind; a maximum does not change by repeated pixels
        before, behind = around // 2, around - around // 2
        parts["pad"] = nn.ReplicationPad2d((before, behind, before, behind))
    parts["pool"] = nn.MaxPool2d(size, stride, padding=0 if around % 2 else around // 2)
    return nn.Sequential(parts), came[0], stride


def _upsample(section: Section, came: list[int]) -> tuple[nn.Module, int, float]:
    stride = section.whole("stride", 2)
    return nn.Upsample(scale_factor=stride, mode="nearest"), came[0], 1 / stride


def _yolo(section: Section, came: list[int]) -> tuple[nn.Module, int, int]:
    return nn.Identity(), came[0], 1


MAKERS = {
    "convolutional": _convolution,
    "shortcut": _shortcut,
    "route": _route,
    "maxpool": _maxpool,
    "upsample": _upsample,
    "yolo": _yolo,
}


def _head(section: Section, cells: list[float], channels: int, num_classes: int | None) -> Head:
    """Returns the settings of a `[yolo]` section, checked against the layer before it and the data set."""
    sides = section.numbers("anchors")
    pairs = list(zip(sides[::2], sides[1::2]))
    mask = [int(v) for v in section.numbers("mask")] if "mask" in section.options else range(len(pairs))
    if any(not 0 <= i < len(pairs) for i in mask):
        raise QexpError(
            f"[yolo] in line {section.line}: mask={section.options['mask']}; there are {len(pairs)} anchors, from 0"
        )
    classes = section.whole("classes", 20)
    if channels != len(mask) * (5 + classes):
        raise QexpError(
            f"[yolo] in line {section.line}: {len(mask)} anchors and {classes} classes need {len(mask) * (5 + classes)} "
            f"filters before it, there are {channels}"
        )
    if num_classes is not None and num_classes != classes:
        raise QexpError(
            f"[yolo] in line {section.line}: has {classes} classes, the data set {num_classes}; choose another"
        )
    return Head(
        (int(cells[0]), int(cells[1])),
        [pairs[i] for i in mask],
        section.number("scale_x_y", 1.0),
        section.number("ignore_thresh", 0.5),
        section.number("iou_normalizer", 0.75),
    )
