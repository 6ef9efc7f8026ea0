"""SqueezeNet with batch norms whose result is a face embedding."""

from __future__ import annotations

from torch import Tensor, nn

from qexp.models.modules import Concat

FIRES = ((64, 16, 64), (128, 16, 64), None, (128, 32, 128), (256, 32, 128), None)
FIRES = (*FIRES, (256, 48, 192), (384, 48, 192), (384, 64, 256), (512, 64, 256))


class SqueezeNetFace(nn.Module):
    """Embeddings `[N, features]` of aligned faces `[N, 3, H, W]` (160 x 160 as published), to be compared by their cosine.

    The layout is that of SqueezeNet 1.1 with bias-free convolutions, each with a batch norm; a 1x1 convolution to 1000 maps (no ReLU,
    unlike SqueezeNet 1.1), their means, a linear layer and a last batch norm follow.

    Args:
        features: Length of the embedding.
        eps: Of the batch norms.

    Source: the face network of CAQ (TensorFlow); layout Iandola et al. 2016 (arXiv 1602.07360), version 1.1.
    """

    def __init__(self, features: int = 128, eps: float = 1e-3) -> None:
        super().__init__()
        layers: list[nn.Module] = [*_unit(3, 64, 3, eps, stride=2), nn.MaxPool2d(3, 2, ceil_mode=True)]
        for fire in FIRES:
            layers.append(nn.MaxPool2d(3, 2, ceil_mode=True) if fire is None else Fire(*fire, eps))
        self.features = nn.Sequential(*layers)
        self.conv10 = nn.Conv2d(512, 1000, 1)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.embedding = nn.Linear(1000, features, bias=False)
        self.bn = nn.BatchNorm1d(features, eps)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(self.conv10(self.features(x)))
        return self.bn(self.embedding(x.flatten(1)))


class Fire(nn.Module):
    """Squeeze to few channels, expand by 1x1 and 3x3 filters, one beside the other."""

    def __init__(self, inputs: int, squeeze: int, expand: int, eps: float) -> None:
        super().__init__()
        self.squeeze = nn.Sequential(*_unit(inputs, squeeze, 1, eps))
        self.expand1x1 = nn.Sequential(*_unit(squeeze, expand, 1, eps))
        self.expand3x3 = nn.Sequential(*_unit(squeeze, expand, 3, eps, padding=1))
        self.concat = Concat()

    def forward(self, x: Tensor) -> Tensor:
        x = self.squeeze(x)
        return self.concat(self.expand1x1(x), self.expand3x3(x))


def _unit(inputs: int, outputs: int, kernel: int, eps: float, stride: int = 1, padding: int = 0) -> list[nn.Module]:
    conv = nn.Conv2d(inputs, outputs, kernel, stride, padding, bias=False)
    return [conv, nn.BatchNorm2d(outputs, eps), nn.ReLU()]
