"""Runs of networks whose graph is no chain of modules: what they lose is told, what they compute is right."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from qexp.models.digits_cnn import DigitsCNN


class Deciding(DigitsCNN):
    """Which calls are made depends on the images."""

    def forward(self, x):
        return super().forward(x) if x.mean() > 0 else super().forward(x * 1.0)


class Blurred(DigitsCNN):
    """A fixed filter before the network."""

    def __init__(self, **options) -> None:
        super().__init__(**options)
        self.register_buffer("filter", torch.full((1, 1, 3, 3), 1 / 9))

    def forward(self, x):
        return super().forward(nn.functional.conv2d(x, self.filter, padding=1))
