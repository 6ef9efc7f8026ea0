"""The 1,797 handwritten digits that ship inside scikit-learn: real images without a download."""

from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import torch

from qexp.data.balance import balanced
from qexp.data.base import Arrays, ImageData


class Digits(ImageData):
    """8x8 grey digits with values 0..16: 1,297 training images, calibration part included, and 500 for testing.

    scikit-learn has no split, so the test split is a fixed draw of 50 per class, the same for every seed. The
    writers are not separated: both splits hold digits of the same writers.

    Source: Alpaydin, Kaynak, Optical Recognition of Handwritten Digits, 1998, doi:10.24432/C50P49 (its test part).
    """

    num_classes = 10
    class_names = tuple("0123456789")
    max_value = 16.0
    test_size = 500

    def __init__(
        self,
        *,
        batch_size: int = 64,
        eval_batch_size: int = 500,
        mean: tuple[float, ...] = (0.306,),
        std: tuple[float, ...] = (0.376,),
        calibration_size: int = 200,
        **options: Any,
    ) -> None:
        super().__init__(
            batch_size=batch_size,
            eval_batch_size=eval_batch_size,
            mean=mean,
            std=std,
            calibration_size=calibration_size,
            **options,
        )

    def sources(self) -> list[Path]:
        return [Path(str(files("sklearn.datasets.data") / "digits.csv.gz"))]

    def read(self) -> Arrays:
        from sklearn.datasets import load_digits  # a second to import

        raw = load_digits()
        images = torch.from_numpy(raw.images.astype(np.uint8)).unsqueeze(1)
        labels = torch.from_numpy(raw.target.astype(np.int64))
        test = torch.zeros(len(labels), dtype=torch.bool)
        test[balanced(labels, self.test_size, seed=0)] = True
        return Arrays(images[~test], labels[~test], images[test], labels[test])
