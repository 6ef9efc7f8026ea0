"""The handwritten digits for two other tasks: finding the ink, and removing noise."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from qexp.data.base import Arrays
from qexp.data.digits import Digits


class DigitMasks(Digits):
    """Digits whose target is a map `[H, W]`: 1 where there is ink, 0 where there is paper.

    Args:
        ink: Pixels above this value (of 0..16) are ink.
        options: See `Digits`.
    """

    def __init__(self, *, ink: int = 5, **options: Any) -> None:
        super().__init__(**options)
        self.ink = ink

    def read(self) -> Arrays:
        digits = super().read()
        masks = [(images[:, 0] > self.ink).long() for images in (digits.train_images, digits.test_images)]
        return digits._replace(train_targets=masks[0], test_targets=masks[1])


class NoisyDigits(Digits):
    """Digits with noise, which is the same for every seed; the target is the clean image, its values in 0..1.

    Args:
        noise: Standard deviation, of pixels in 0..16.
        options: See `Digits`.
    """

    def __init__(self, *, noise: float = 4.0, **options: Any) -> None:
        super().__init__(**options)
        self.noise = noise

    def read(self) -> Arrays:
        digits, generator = super().read(), torch.Generator().manual_seed(0)

        def noisy(images: Tensor) -> Tensor:
            added = self.noise * torch.randn(images.shape, generator=generator)
            return (images + added).round().clamp(0, self.max_value).to(torch.uint8)

        clean = [images.float() / self.max_value for images in (digits.train_images, digits.test_images)]
        return Arrays(
            noisy(digits.train_images),
            digits.train_labels,
            noisy(digits.test_images),
            digits.test_labels,
            *clean,
        )
