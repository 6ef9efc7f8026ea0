"""ImageNet as distributed: one folder per class, or the flat validation folder with the development kit.

Source: Russakovsky, Deng, Su, Krause et al. 2015, ImageNet Large Scale Visual Recognition Challenge, arXiv:1409.0575.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from qexp.data.decode import Source
from qexp.data.image_folder import ImageFolder
from qexp.data.listing import Classes, Listing, by_folder, images, read_classes, read_text
from qexp.errors import QexpError

CLASSES = 1000
TRUTH = "ILSVRC2012_validation_ground_truth.txt"
LISTS = ("classes.csv", "LOC_synset_mapping.txt", "synset_words.txt")


class ImageNet(ImageFolder):
    """1,000 classes in the order of their WordNet ids, 50,000 validation images.

    `<root>/val/<wnid>/*.JPEG`, or `<root>/val/ILSVRC2012_val_*.JPEG` with the development kit's folder (`data/meta.mat` and
    the ground truth) somewhere below `root`. If class folders are missing, a list of classes gives the numbers:
    `classes.csv`, `LOC_synset_mapping.txt` or `synset_words.txt` below `root`, or the development kit.

    Args:
        root: The folder.
        options: The arguments of `ImageFolder`.
    """

    def __init__(self, root: str | Path, *, name: str = "imagenet", num_classes: int = CLASSES, **options: Any) -> None:
        super().__init__(root, name=name, num_classes=num_classes, **options)

    def list_test(self, source: Source, classes: Classes | None) -> tuple[Listing, Classes]:
        if self.labels_file or self.label_from:
            return super().list_test(source, classes or self._known(required=True))
        names = images(source)
        flat = sum("/" not in name for name in names)
        if flat == len(names):
            return self._by_ground_truth(source, names)
        there = {name.partition("/")[0] for name in names}
        return by_folder(source, classes or self._known(required=len(there) != CLASSES))

    def _known(self, required: bool) -> Classes | None:
        """The classes from a list beside the images; None if the folders themselves are the list."""
        for name in LISTS:
            if (self.root / name).is_file():
                return read_classes(self.root / name)
        if kit := self._kit(required=False):
            wnids, names = zip(*sorted(read_meta(kit / "meta.mat").values()))
            return Classes(wnids, names)
        if required:
            raise QexpError(
                f"{self.name}: {self.root} does not hold all {CLASSES} class folders, so their numbers are unknown. Put a list of "
                f"all classes there ({', '.join(LISTS)}) or the development kit ({TRUTH}, meta.mat)"
            )
        return None

    def _kit(self, required: bool) -> Path | None:
        """The development kit's data folder."""
        for pattern in ("", "data/", "*/", "*/data/"):
            for path in sorted(self.root.glob(f"{pattern}meta.mat")):
                return path.parent
        if not required:
            return None
        raise QexpError(
            f"{self.name}: {self.root / (self.test or '')} holds images without class folders, and there is no development kit "
            f"with their classes. Unpack ILSVRC2012_devkit_t12 (data/meta.mat, data/{TRUTH}) into {self.root}, or sort the "
            "images into folders by class"
        )

    def _by_ground_truth(self, source: Source, names: list[str]) -> tuple[Listing, Classes]:
        kit = self._kit(required=True)
        meta = read_meta(kit / "meta.mat")
        wnids, words = zip(*sorted(meta.values()))
        number = {wnid: i for i, wnid in enumerate(wnids)}
        truth = read_text(kit / TRUTH).split()
        labels = []
        for name in names:
            match = re.search(r"_(\d{8})\.\w+$", name)
            place = int(match[1]) if match else 0
            if not 1 <= place <= len(truth):
                raise QexpError(
                    f"{source.path / name}: no number 1..{len(truth)} of {TRUTH} in its name; ILSVRC2012_val_00000001.JPEG "
                    "is such a name"
                )
            ident = truth[place - 1]
            if not ident.isdigit() or int(ident) not in meta:
                raise QexpError(f"{kit / TRUTH}: line {place} is {ident!r}, which is none of the {len(meta)} classes")
            labels.append(number[meta[int(ident)][0]])
        return Listing(source, tuple(names), tuple(labels)), Classes(wnids, words)

    def how_to_get(self) -> str:
        return (
            "ImageNet is fetched by hand from https://image-net.org (registration): unpack ILSVRC2012_img_val.tar into "
            f"{self.root / 'val'}, sorted into class folders or with ILSVRC2012_devkit_t12 beside it. QEXP_DATA_DIR or "
            "dataset.data.root names another folder"
        )


def read_meta(path: Path) -> dict[int, tuple[str, str]]:
    """The 1,000 classes of the development kit's `meta.mat`: their own number -> (WordNet id, words)."""
    from scipy.io import loadmat

    try:
        rows = loadmat(path, squeeze_me=True)["synsets"]
        leaves = {
            int(r["ILSVRC2012_ID"]): (str(r["WNID"]), str(r["words"])) for r in rows if int(r["num_children"]) == 0
        }
    except (OSError, ValueError, KeyError, TypeError, NotImplementedError) as error:
        raise QexpError(f"{path}: cannot be read as the development kit's list of classes ({error})") from error
    if not leaves:
        raise QexpError(f"{path}: it holds no classes")
    return leaves
