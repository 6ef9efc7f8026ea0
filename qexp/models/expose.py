"""Gives the blocks of torchvision's networks a module for every add, concatenation and activation.

Each class here is a torchvision block with another `forward`. An instance changes its class in place (`__class__`), so its
parameters, keys, hooks and outputs stay the same, to the bit; pickle and deepcopy find the class by name.
"""

from typing import ClassVar

import torch
from torch import Tensor, nn
from torchvision.models import (
    convnext,
    efficientnet,
    inception,
    mnasnet,
    mobilenetv2,
    mobilenetv3,
    regnet,
    resnet,
    squeezenet,
)
from torchvision.models.googlenet import BasicConv2d as GoogLeNetConv  # `models.googlenet` is the function
from torchvision.models.googlenet import Inception as GoogLeNetInception

from qexp.models.modules import Add, Concat


def expose_adds(model: nn.Module) -> None:
    """Re-classes, in place, every torchvision block in `model` that adds, concatenates or shares an activation.

    Afterwards `BasicBlock` has `add, relu1, relu2`; `Bottleneck` `add, relu1, relu2, relu3`; `InvertedResidual` `add`
    where it is residual; Fire and Inception blocks `concat` (the widest Inception blocks also `concat3x3` and
    `concat3x3dbl`); their convolutions `relu`; MobileNetV2 `pool`; the residual blocks of MobileNetV3, MNASNet, EfficientNet,
    RegNet and ConvNeXt `add`. Other modules do not change; a second call changes nothing.
    """
    for module in list(model.modules()):
        exposed = EXPOSED.get(type(module))
        # a block without a residual keeps its class: an add that never runs could never be calibrated
        residual = getattr(module, "use_res_connect", True) and getattr(module, "apply_residual", True)
        if exposed is None or not residual:
            continue
        module.__class__ = exposed
        if "relu1" in exposed.parts:
            del module.relu
        for name, kind in exposed.parts.items():
            module.add_module(name, kind().train(module.training))


class ExposedBasicBlock(resnet.BasicBlock):
    """ResNet's block of two 3x3 convolutions."""

    parts: ClassVar = {"add": Add, "relu1": nn.ReLU, "relu2": nn.ReLU}

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu1(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        return self.relu2(self.add(y, x if self.downsample is None else self.downsample(x)))


class ExposedBottleneck(resnet.Bottleneck):
    """ResNet's block of a 3x3 between two 1x1 convolutions."""

    parts: ClassVar = {"add": Add, "relu1": nn.ReLU, "relu2": nn.ReLU, "relu3": nn.ReLU}

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu1(self.bn1(self.conv1(x)))
        y = self.relu2(self.bn2(self.conv2(y)))
        y = self.bn3(self.conv3(y))
        return self.relu3(self.add(y, x if self.downsample is None else self.downsample(x)))


class ExposedInvertedResidual(mobilenetv2.InvertedResidual):
    """MobileNetV2's block where it has a residual."""

    parts: ClassVar = {"add": Add}

    def forward(self, x: Tensor) -> Tensor:
        return self.add(x, self.conv(x))


class ExposedMobileNetV2(mobilenetv2.MobileNetV2):
    """MobileNetV2 with its last pooling a module."""

    parts: ClassVar = {"pool": lambda: nn.AdaptiveAvgPool2d(1)}

    def _forward_impl(self, x: Tensor) -> Tensor:
        return self.classifier(torch.flatten(self.pool(self.features(x)), 1))


class ExposedInvertedResidualV3(mobilenetv3.InvertedResidual):
    """MobileNetV3's block where it has a residual."""

    parts: ClassVar = {"add": Add}

    def forward(self, x: Tensor) -> Tensor:
        return self.add(self.block(x), x)


class ExposedMNASNetBlock(mnasnet._InvertedResidual):
    """MNASNet's block where it has a residual."""

    parts: ClassVar = {"add": Add}

    def forward(self, x: Tensor) -> Tensor:
        return self.add(self.layers(x), x)


class ExposedMBConv(efficientnet.MBConv):
    """EfficientNet's block where it has a residual."""

    parts: ClassVar = {"add": Add}

    def forward(self, x: Tensor) -> Tensor:
        return self.add(self.stochastic_depth(self.block(x)), x)


class ExposedFusedMBConv(efficientnet.FusedMBConv):
    """EfficientNetV2's block of a full convolution, where it has a residual."""

    parts: ClassVar = {"add": Add}

    def forward(self, x: Tensor) -> Tensor:
        return self.add(self.stochastic_depth(self.block(x)), x)


class ExposedRegNetBlock(regnet.ResBottleneckBlock):
    """RegNet's block."""

    parts: ClassVar = {"add": Add}

    def forward(self, x: Tensor) -> Tensor:
        return self.activation(self.add(x if self.proj is None else self.proj(x), self.f(x)))


class ExposedCNBlock(convnext.CNBlock):
    """ConvNeXt's block."""

    parts: ClassVar = {"add": Add}

    def forward(self, x: Tensor) -> Tensor:
        return self.add(self.stochastic_depth(self.layer_scale * self.block(x)), x)


class ExposedFire(squeezenet.Fire):
    """SqueezeNet's block."""

    parts: ClassVar = {"concat": Concat}

    def forward(self, x: Tensor) -> Tensor:
        x = self.squeeze_activation(self.squeeze(x))
        left = self.expand1x1_activation(self.expand1x1(x))
        return self.concat(left, self.expand3x3_activation(self.expand3x3(x)))


class ExposedGoogLeNetConv(GoogLeNetConv):
    """Convolution, BN, ReLU."""

    parts: ClassVar = {"relu": nn.ReLU}

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.bn(self.conv(x)))


class ExposedInceptionConv(inception.BasicConv2d):
    """Convolution, BN, ReLU."""

    parts: ClassVar = {"relu": nn.ReLU}

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.bn(self.conv(x)))


class _Branches:
    """The branches that torchvision's `_forward` lists, side by side."""

    parts: ClassVar = {"concat": Concat}

    def forward(self, x: Tensor) -> Tensor:
        return self.concat(*self._forward(x))


class ExposedInception(_Branches, GoogLeNetInception):
    """GoogLeNet's block."""


class ExposedInceptionA(_Branches, inception.InceptionA):
    """Inception v3's block of the 35x35 maps."""


class ExposedInceptionB(_Branches, inception.InceptionB):
    """Inception v3's reduction from 35x35 to 17x17."""


class ExposedInceptionC(_Branches, inception.InceptionC):
    """Inception v3's block of the 17x17 maps."""


class ExposedInceptionD(_Branches, inception.InceptionD):
    """Inception v3's reduction from 17x17 to 8x8."""


class ExposedInceptionE(inception.InceptionE):
    """Inception v3's block of the 8x8 maps, with a concatenation inside two of its branches."""

    parts: ClassVar = {
        "concat3x3": Concat,
        "concat3x3dbl": Concat,
        "pool": lambda: nn.AvgPool2d(3, stride=1, padding=1),
        "concat": Concat,
    }

    def forward(self, x: Tensor) -> Tensor:
        y = self.branch3x3_1(x)
        branch3x3 = self.concat3x3(self.branch3x3_2a(y), self.branch3x3_2b(y))
        y = self.branch3x3dbl_2(self.branch3x3dbl_1(x))
        branch3x3dbl = self.concat3x3dbl(self.branch3x3dbl_3a(y), self.branch3x3dbl_3b(y))
        return self.concat(self.branch1x1(x), branch3x3, branch3x3dbl, self.branch_pool(self.pool(x)))


EXPOSED: dict[type[nn.Module], type[nn.Module]] = {
    resnet.BasicBlock: ExposedBasicBlock,
    resnet.Bottleneck: ExposedBottleneck,
    mobilenetv2.InvertedResidual: ExposedInvertedResidual,
    mobilenetv2.MobileNetV2: ExposedMobileNetV2,
    mobilenetv3.InvertedResidual: ExposedInvertedResidualV3,
    mnasnet._InvertedResidual: ExposedMNASNetBlock,
    efficientnet.MBConv: ExposedMBConv,
    efficientnet.FusedMBConv: ExposedFusedMBConv,
    regnet.ResBottleneckBlock: ExposedRegNetBlock,
    convnext.CNBlock: ExposedCNBlock,
    squeezenet.Fire: ExposedFire,
    GoogLeNetConv: ExposedGoogLeNetConv,
    GoogLeNetInception: ExposedInception,
    inception.BasicConv2d: ExposedInceptionConv,
    inception.InceptionA: ExposedInceptionA,
    inception.InceptionB: ExposedInceptionB,
    inception.InceptionC: ExposedInceptionC,
    inception.InceptionD: ExposedInceptionD,
    inception.InceptionE: ExposedInceptionE,
}
