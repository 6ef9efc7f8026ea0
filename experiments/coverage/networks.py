"""The networks of the coverage table: every file of `conf/model`, torchvision's, and forty of timm."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

CONF = Path(__file__).parents[2] / "conf"
SIZES = {  # the smallest images that suit the network; 64 where nothing is named
    "regnet_y_128gf": 32,
    "vit_h_14": 56,
    **dict.fromkeys(("inception_v3",), 96),
    **dict.fromkeys(("alexnet", "googlenet"), 96),
    **dict.fromkeys(("swin_tiny_patch4_window7_224", "deit_tiny_patch16_224", "vit_tiny_patch16_224"), 224),
    **dict.fromkeys(("cait_xxs24_224", "xcit_nano_12_p16_224", "mixer_s32_224", "gmlp_ti16_224", "resmlp_12_224"), 224),
    **dict.fromkeys(("pit_ti_224", "twins_pcpvt_small"), 224),
}
FILES = {"darknet": [f"model.cfg={Path(__file__).parent / 'darknet.cfg'}"]}  # networks that are read from a file
NAMED = ("import", "timm", "torchvision")  # files that take any network by its name
TIMM = (
    *("resnet18", "resnet26d", "resnext26ts", "seresnet18", "skresnet18", "ecaresnet26t", "res2net50_26w_4s"),
    *("mobilenetv2_100", "mobilenetv3_small_100", "mobilenetv4_conv_small", "efficientnet_b0", "tf_efficientnet_b0"),
    *("efficientnet_lite0", "mixnet_s", "mnasnet_small", "fbnetc_100", "ghostnet_100", "lcnet_050", "tinynet_e"),
    *("regnetx_002", "regnety_002", "densenet121", "dla34", "dpn48b", "cspresnet50", "cspdarknet53", "darknet53"),
    *("repvgg_a0", "vgg11_bn", "hrnet_w18_small", "rexnet_100", "selecsls42b", "vovnet39a", "nfnet_l0", "resnetv2_50"),
    *("convnext_atto", "convmixer_768_32", "deit_tiny_patch16_224", "swin_tiny_patch4_window7_224", "mixer_s32_224"),
)


@dataclass(frozen=True)
class Network:
    """One row of the table: `source` is `conf`, `torchvision`, `detection`, `segmentation` or `timm`."""

    source: str
    name: str

    @property
    def key(self) -> str:
        """The row's name."""
        return f"{self.source}/{self.name}"

    @property
    def scores(self) -> bool:
        """Whether its result is one tensor of scores, so that it could be lowered."""
        return self.source != "detection"

    def build(self) -> tuple[nn.Module, Any]:
        """Returns the network with random weights and images for it."""
        torch.manual_seed(0)
        if self.source == "conf":
            return _of_conf(self.name)
        if self.source == "timm":
            import timm

            return timm.create_model(self.name, pretrained=False), _images(SIZES.get(self.name, 64))
        from torchvision import models

        if self.source == "torchvision":
            size = SIZES.get(self.name, 224 if self.name == "maxvit_t" else 64)
            options = {"init_weights": False} if self.name in ("googlenet", "inception_v3") else {}
            options |= {"image_size": size} if self.name.startswith("vit_") else {}
            return models.get_model(self.name, weights=None, **options), _images(size)
        model = models.get_model(self.name, weights=None, weights_backbone=None)
        if self.source == "segmentation":
            return Scores(model), _images(96, 2)
        return model, list(_images(128, 2))


class Scores(nn.Module):
    """A segmentation network of torchvision, whose result is a dictionary, with its scores alone as result."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        return self.network(x)["out"]


def networks() -> Iterator[Network]:
    """Yields every row of the table."""
    from torchvision import models

    for path in sorted((CONF / "model").glob("*.yaml")):
        if not path.name.startswith("_") and path.stem not in NAMED:
            yield Network("conf", path.stem)
    for name in sorted(models.list_models(module=models)):
        yield Network("torchvision", name)
    for kind in ("detection", "segmentation"):
        for name in sorted(models.list_models(module=getattr(models, kind))):
            yield Network(kind, name)
    for name in TIMM:
        yield Network("timm", name)


def _of_conf(name: str) -> tuple[nn.Module, Tensor]:
    from hydra import compose, initialize_config_dir
    from omegaconf import OmegaConf

    from qexp.command.root import register
    from qexp.system.objects import make

    register()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = compose("config", overrides=[f"model={name}", *FILES.get(name, [])])
    net = OmegaConf.to_container(cfg.model.net, resolve=True)
    size = cfg.model.get("input_size")
    if size is None:
        return make(net, where="model.net"), _images(64)
    small = size[:1] + [min(n, 96) if size[1] == 224 else n for n in size[1:]]
    return make(net, where="model.net"), torch.randn(4, *small)


def _images(size: int, count: int = 4) -> Tensor:
    return torch.randn(count, 3, size, size)
