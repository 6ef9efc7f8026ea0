"""A tiny detector in Darknet's words, with one section of every kind that is read."""

from pathlib import Path

_CFG = """
[net]
width={side}
height={side}
channels=3
[convolutional]   # layers.0
filters=8
size=3
stride=2
pad=1
batch_normalize=1
activation=relu
[convolutional]
filters=8
size=3
groups=8
stride=1
pad=1
batch_normalize=1
activation=leaky
[shortcut]        # layers.2
from=-2
activation=linear
[maxpool]
size=2
stride=2
[route]           # layers.4
layers=-1
[upsample]
stride=2
[route]
layers=-1, 2
[convolutional]   # layers.7
filters=16
size=3
stride=2
pad=1
batch_normalize=1
activation=relu
[convolutional]   # layers.8
filters={filters}
size=1
pad=1
activation=linear
[yolo]
mask=1,0
anchors=10,10, 40,30
classes={classes}
scale_x_y=1.5
"""


def write_cfg(folder: Path, side: int = 32, classes: int = 2) -> Path:
    """Writes `tiny.cfg` for images of `side` pixels, with 2 boxes of `5 + classes` numbers on each of `(side / 4) ** 2` cells."""
    path = folder / "tiny.cfg"
    path.write_text(_CFG.format(side=side, classes=classes, filters=2 * (5 + classes)))
    return path
