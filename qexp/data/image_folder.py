"""Image files sorted into classes, such as a user's own: packed once, then evaluated from a memory-mapped file."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qexp.data.balance import balanced
from qexp.data.base import Arrays, ImageData
from qexp.data.decode import Resize, Source, of_weights
from qexp.data.listing import Classes, Listing, by_folder, by_list, by_name, read_classes
from qexp.data.packing import packed
from qexp.data.training_files import TrainingFiles
from qexp.errors import QexpError

log = logging.getLogger(__name__)


class ImageFolder(ImageData):
    """Images in files; evaluation and calibration images are decoded once and kept as a pack.

    The class of an image comes from its folder, from a list (`labels`), or from its name (`label_from`). If there is a training
    folder, calibration images are a class-balanced seeded draw from it. Otherwise they are drawn from the evaluation images and
    excluded from the evaluation; the column `calibration_from` of the results records this.

    Args:
        root: The folder.
        name: Name of the data set in messages, files and results.
        num_classes: Outputs of the network; must equal the number of classes.
        test: Evaluation images: a folder or a `.zip` below `root`; `null` is `root` itself.
        train: Training images, likewise; `null` or a missing folder means none.
        classes: File below `root` with the classes, `id`, `id,name` or `index,id,name` per line; by default the folders.
        labels: A file below `root` with lines `file,class` for the evaluation images.
        label_from: A regular expression whose group is the class (id or number) in a file's name.
        pack_dir: Folder of the packs.
        resize: Shorter side, or `[height, width]` to squash to, before the crop. By default it comes from the weights, then from
            `usual`, then 8/7 crop.
        crop: Side of the square that is cut from the middle.
        interpolation: `nearest`, `bilinear`, `bicubic`, `lanczos`; by default as for `resize`.
        usual: `{resize, interpolation}` of the network.
        weights: The run's weights; the transforms of torchvision's weights are used.
        network: torchvision's name of the network, used to find a bare weight name.
        bad_images: `skip` (counted and reported) or `error`.
        workers: Processes that decode; `null` follows the number of processors.
        note: Remark about the images, for readers of the results.
        options: The arguments of `ImageData`; `augment` is `{scale: [low, high], flip: true|false}` of the random crop.
    """

    def __init__(
        self,
        root: str | Path,
        *,
        name: str,
        num_classes: int,
        test: str | None = "val",
        train: str | None = "train",
        classes: str | None = None,
        labels: str | None = None,
        label_from: str | None = None,
        pack_dir: str | Path = "data/packed",
        resize: int | Sequence[int] | None = None,
        crop: int = 224,
        interpolation: str | None = None,
        usual: Mapping[str, Any] | None = None,
        weights: str | None = None,
        network: str | None = None,
        bad_images: str = "skip",
        workers: int | None = None,
        note: str = "",
        augment: Mapping[str, Any] | None = None,
        batch_size: int = 64,
        eval_batch_size: int = 64,
        mean: Sequence[float] = (0.485, 0.456, 0.406),
        std: Sequence[float] = (0.229, 0.224, 0.225),
        **options: Any,
    ) -> None:
        super().__init__(batch_size=batch_size, eval_batch_size=eval_batch_size, mean=mean, std=std, **options)
        self.root, self.pack_dir, self.name, self.num_classes = Path(root), Path(pack_dir), name, num_classes
        self.test, self.train, self.classes_file = test, train, classes
        self.labels_file, self.label_from = labels, label_from
        if train is not None and _same_or_inside(self.root / (test or ""), self.root / train):
            raise QexpError(
                f"{name}: test={test} and train={train} hold the same images; evaluation images must not be used for fitting: name "
                "disjoint folders, or train=null, and a part of the evaluation images is set aside"
            )
        usual = {"resize": None, "interpolation": "bilinear", **(usual or {})}
        if usual["resize"] is None:
            usual["resize"] = round(
                crop * 8 / 7
            )  # 256 for 224: the crop covers the same share of the image at any size
        if found := of_weights(weights, network):
            usual["resize"], usual["interpolation"] = found
        size = resize if resize is not None else usual["resize"]
        self.resize = Resize(
            int(size) if isinstance(size, int | float) else tuple(int(s) for s in size),
            crop,
            interpolation or usual["interpolation"],
        )
        self.bad_images, self.workers, self.note = bad_images, workers, note
        self.random_crop = {"scale": (0.08, 1.0), "flip": True, **(augment or {})}
        if set(self.random_crop) != {"scale", "flip"}:
            raise QexpError(f"{name}: augment={dict(augment or {})} is not allowed; use the keys scale and flip")
        self.class_names = tuple(map(str, range(num_classes)))

    def read(self) -> Arrays:
        evaluation, training = self.listings
        test = self._packed(evaluation, "test")
        if training is None:
            return Arrays(test, test.labels, test, test.labels)
        chosen = self._packed(training.take(self._drawn), "calibration")
        return Arrays(chosen, chosen.labels, test, test.labels)

    def _packed(self, listing: Listing, part: str):
        return packed(listing, self.resize, self.pack_dir, f"{self.name}-{part}", self.workers, self.bad_images)

    @cached_property
    def listings(self) -> tuple[Listing, Listing | None]:
        """The evaluation images and, where there is a training folder, the training images; sets the class names."""
        source = self._source(self.test)
        classes = read_classes(self.root / self.classes_file) if self.classes_file else None
        evaluation, classes = self.list_test(source, classes)
        if len(classes.ids) != self.num_classes:
            raise QexpError(
                f"{self.name}: {len(classes.ids)} classes ({', '.join(classes.ids[:4])} ...) in {source.path}, "
                f"dataset.num_classes={self.num_classes}; they must agree, or name a list of all classes, dataset.data.classes"
            )
        self.class_names = classes.names
        if self.train is None or not (self.root / self.train).exists():
            return evaluation, None
        return evaluation, by_folder(self._source(self.train), classes)[0]

    def list_test(self, source: Source, classes: Classes | None) -> tuple[Listing, Classes]:
        """The evaluation images and the classes."""
        if self.labels_file or self.label_from:
            if classes is None:
                raise QexpError(f"{self.name}: labels and label_from need dataset.data.classes, the list of classes")
            if self.labels_file:
                return by_list(source, self.root / self.labels_file, classes), classes
            return by_name(source, self.label_from, classes), classes
        return by_folder(source, classes)

    def _source(self, below: str | None) -> Source:
        path = self.root / below if below else self.root
        if not path.exists():
            raise QexpError(f"{self.name}: {path} does not exist. {self.how_to_get()}")
        return Source(path)

    def how_to_get(self) -> str:
        """Returns instructions for missing images."""
        return (
            "Name the folder, dataset.data.root=..., and in it the evaluation images, dataset.data.test=FOLDER (null for "
            "the folder itself): one folder per class, or a list of labels"
        )

    @cached_property
    def _drawn(self) -> list[int]:
        """Positions in the training listing of the calibration images."""
        labels = torch.tensor(self.listings[1].labels)
        return balanced(labels, self.held_out_of(len(labels)), self.seed).tolist()

    @cached_property
    def calibration_part(self) -> Tensor:
        """Positions in `arrays.train_images` of the calibration images: all of them, or the part set aside."""
        labels = self.arrays.train_labels
        if self.listings[1] is not None:
            return torch.arange(len(labels))
        most = self.calibration_size if self.calibration_size < len(labels) else len(labels) // 2
        # both parts come from one pool: where it is too small, half is left to test on
        return balanced(
            labels, self.held_out_of(len(labels), "evaluation images to set aside from", least=0, most=most), self.seed
        )

    @property
    def test_candidates(self) -> Tensor:
        """The evaluation images without those used for calibration, in their order."""
        keep = torch.ones(len(self.arrays.test_labels), dtype=torch.bool)
        if self.listings[1] is None:
            keep[self.calibration_part] = False
        return keep.nonzero().flatten()

    def train_dataloader(self):
        """The training images that are not held out, decoded again each epoch, randomly cropped and mirrored."""
        training = self.listings[1]
        if training is None:
            where = self.root / self.train if self.train else f"{self.root} (dataset.data.train=null)"
            raise QexpError(
                f"{self.name}: nothing to train on: no training images in {where}. Quantize without training "
                "(schedule=ptq) from weights=... (weights=random to try a network), or name them, dataset.data.train"
            )
        held = set(self._drawn)
        if len(held) == len(training):
            raise self.nothing_left(len(training))
        rest = training.take([i for i in range(len(training)) if i not in held])
        return TrainingFiles(rest, self.resize, **self.random_crop).loader(
            self.batch_size, self.normalize, self.seed, self.drop_last, self.workers, self.channels_last
        )

    @property
    def preprocessing(self) -> dict[str, Any]:
        return {**super().preprocessing, **asdict(self.resize), "augment": self.random_crop}

    def notes(self) -> dict[str, Any]:
        """Columns about the images in the results."""
        n, seed = len(self.calibration_part), self.seed
        packs = {id(a): a for a in (self.arrays.train_images, self.arrays.test_images)}.values()
        source = f"{n} images of the training side, seed {seed}"
        if self.listings[1] is None:
            source = f"{n} images set aside from the evaluation images, seed {seed}" if n else "none"
        out: dict[str, Any] = {"calibration_from": source, "n_skipped": sum(len(p.skipped) for p in packs)}
        return out | ({"note": self.note} if self.note else {})

    def content_hash(self) -> str:
        """Returns a hash of the packs and of the calibration part."""
        packs = [self.arrays.train_images.content, self.arrays.test_images.content]
        text = json.dumps([self.normalize.identity(), packs, self.calibration_part.tolist()])
        return hashlib.sha256(text.encode()).hexdigest()


def _same_or_inside(one: Path, other: Path) -> bool:
    """Returns whether two existing folders are the same, or one contains the other."""
    if not (one.exists() and other.exists()):
        return False
    one, other = one.resolve(), other.resolve()
    return one == other or one in other.parents or other in one.parents
