"""A small network with an output per pixel; it trains in seconds on the 8x8 digits."""

from torch import Tensor, nn


class Pixelwise(nn.Module):
    """Three convolutions that keep the image's size: `[N, channels, H, W] -> [N, outputs, H, W]`.

    Args:
        outputs: Values per pixel: scores of classes, or channels of an image.
        channels: Channels of the input.
        width: Channels of the inner layers.
    """

    def __init__(self, outputs: int, channels: int = 1, width: int = 16) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.relu2 = nn.ReLU()
        self.head = nn.Conv2d(width, outputs, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu1(self.bn1(self.conv1(x)))
        return self.head(self.relu2(self.bn2(self.conv2(x))))
