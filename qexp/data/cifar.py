"""CIFAR-10 and CIFAR-100, from torchvision's folder or from one `.npz` file.

Source: Krizhevsky 2009, Learning Multiple Layers of Features from Tiny Images.
"""

import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from qexp.data.base import Arrays, ImageData
from qexp.errors import QexpError

FINE_CLASSES = """
apple aquarium_fish baby bear beaver bed bee beetle bicycle bottle bowl boy bridge bus butterfly camel can
castle caterpillar cattle chair chimpanzee clock cloud cockroach couch crab crocodile cup dinosaur dolphin
elephant flatfish forest fox girl hamster house kangaroo keyboard lamp lawn_mower leopard lion lizard lobster
man maple_tree motorcycle mountain mouse mushroom oak_tree orange orchid otter palm_tree pear pickup_truck
pine_tree plain plate poppy porcupine possum rabbit raccoon ray road rocket rose sea seal shark shrew skunk
skyscraper snail snake spider squirrel streetcar sunflower sweet_pepper table tank telephone television tiger
tractor train trout tulip turtle wardrobe whale willow_tree wolf woman worm
"""


class CIFAR10(ImageData):
    """60,000 colour images 32x32 of 10 classes: 50,000 training images, calibration part included, 10,000 for testing.

    Looked for in this order: `<root>/cifar10.npz` (arrays train_images, train_labels, test_images, test_labels; images
    uint8 [N, 32, 32, 3]), then torchvision's `<root>/cifar-10-batches-py`.

    Args:
        root: The folder that holds either of them.
        download: Fetch torchvision's archive into `root` if it is not there.
        options: The arguments of `ImageData`.
    """

    num_classes = 10
    class_names = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
    npz = "cifar10.npz"
    folder = "cifar-10-batches-py"
    archive = "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz"

    def __init__(
        self,
        root: str | Path,
        *,
        download: bool = False,
        batch_size: int = 128,
        eval_batch_size: int = 500,
        mean: tuple[float, ...] = (0.4914, 0.4822, 0.4465),
        std: tuple[float, ...] = (0.2023, 0.1994, 0.2010),
        **options: Any,
    ) -> None:
        super().__init__(batch_size=batch_size, eval_batch_size=eval_batch_size, mean=mean, std=std, **options)
        self.root, self.download = Path(root), download

    def sources(self) -> list[Path]:
        return [self.root / self.npz, self.root / self.folder]

    def prepare_data(self) -> None:
        if not (self.root / self.npz).is_file() and self.download:
            self._torchvision(train=True, download=True)

    def read(self) -> Arrays:
        self.prepare_data()
        if (self.root / self.npz).is_file():
            return read_npz(self.root / self.npz)
        parts = [self._torchvision(train, download=False) for train in (True, False)]
        return Arrays(*(t for part in parts for t in (_chw(part.data), torch.tensor(part.targets))))

    def _torchvision(self, train: bool, download: bool) -> Any:
        from torchvision import datasets

        try:
            return getattr(datasets, type(self).__name__)(str(self.root), train=train, download=download)
        except (RuntimeError, OSError, EOFError) as error:
            found = "is incomplete or damaged" if (self.root / self.folder).exists() else "is not there"
            if download:
                found += f", and the download failed ({error})"
            raise QexpError(
                f"{type(self).__name__}: {self.root / self.folder} {found}, nor is there a {self.npz} in {self.root}. "
                f"Fetch {self.archive} and unpack it into {self.root} (or set dataset.data.download=true where there "
                f"is network), or put {self.npz} there (train_images, train_labels, test_images, test_labels; images "
                f"uint8 [N, 32, 32, 3]). dataset.data.root or QEXP_DATA_DIR names another folder"
            ) from error


class CIFAR100(CIFAR10):
    """60,000 colour images 32x32 of 100 classes (the fine labels), in the same two formats as CIFAR-10."""

    num_classes = 100
    sources = CIFAR10.sources
    class_names = tuple(FINE_CLASSES.split())
    npz = "cifar100.npz"
    folder = "cifar-100-python"
    archive = "https://www.cs.toronto.edu/~kriz/cifar-100-python.tar.gz"

    def __init__(
        self,
        root: str | Path,
        *,
        mean: tuple[float, ...] = (0.507, 0.487, 0.441),
        std: tuple[float, ...] = (0.267, 0.256, 0.276),
        **options: Any,
    ) -> None:
        super().__init__(root, mean=mean, std=std, **options)


def read_npz(path: Path) -> Arrays:
    """The arrays train_images, train_labels, test_images, test_labels of a file, images as [N, C, H, W]."""
    arrays = []
    try:
        with path.open("rb") as raw, np.load(raw, allow_pickle=False) as file:
            names = Arrays._fields[:4]  # labels are the targets here
            missing = [name for name in names if name not in file]
            if missing:
                raise QexpError(f"{path}: no array {', '.join(missing)}; the file holds {', '.join(file.files)}")
            for name in names:
                arrays.append(_images(path, name, file[name]) if "images" in name else _labels(path, name, file[name]))
    except (zipfile.BadZipFile, ValueError, EOFError, OSError) as error:
        raise QexpError(
            f"{path}: cannot be read ({error}); it is truncated or not an .npz file: write it again"
        ) from error
    return Arrays(*arrays)


def _images(path: Path, name: str, array: np.ndarray) -> Tensor:
    if array.dtype != np.uint8 or array.ndim != 4 or array.shape[-1] != 3:
        raise QexpError(f"{path}: {name} is {array.dtype} {list(array.shape)}; uint8 [N, H, W, 3] is needed")
    return _chw(array)


def _labels(path: Path, name: str, array: np.ndarray) -> Tensor:
    if not np.issubdtype(array.dtype, np.integer):
        raise QexpError(f"{path}: {name} is {array.dtype} {list(array.shape)}; integers [N] are needed")
    return torch.from_numpy(array.astype(np.int64))


def _chw(images: np.ndarray) -> Tensor:
    return torch.from_numpy(images).permute(0, 3, 1, 2).contiguous()
