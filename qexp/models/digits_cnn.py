"""A small residual CNN for the 8x8 handwritten digits: it trains in seconds and has every kind of layer for recipes."""

from torch import Tensor, nn

from qexp.models.modules import Add


class DigitsCNN(nn.Module):
    """Class scores [N, num_classes] of images [N, 1, 8, 8]: conv, one residual block, pool, conv, pool, linear.

    Args:
        num_classes: Outputs of the classifier.
        width: Channels of the first half; the second half has twice as many.
    """

    def __init__(self, num_classes: int = 10, width: int = 32) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.relu2 = nn.ReLU()
        self.conv3 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn3 = nn.BatchNorm2d(width)
        self.add = Add()
        self.relu3 = nn.ReLU()
        self.pool1 = nn.MaxPool2d(2)
        self.conv4 = nn.Conv2d(width, 2 * width, 3, padding=1, bias=False)
        self.bn4 = nn.BatchNorm2d(2 * width)
        self.relu4 = nn.ReLU()
        self.pool2 = nn.AdaptiveAvgPool2d(1)
        self.flatten = nn.Flatten()
        self.fc = nn.Linear(2 * width, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu1(self.bn1(self.conv1(x)))
        y = self.relu2(self.bn2(self.conv2(x)))
        x = self.relu3(self.add(self.bn3(self.conv3(y)), x))
        x = self.relu4(self.bn4(self.conv4(self.pool1(x))))
        return self.fc(self.flatten(self.pool2(x)))
