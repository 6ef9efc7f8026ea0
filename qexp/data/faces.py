"""Face pairs: images of faces and the pairs that a network judges."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from qexp.data.contract import DataSet
from qexp.data.decode import BadImage, Source, rgb
from qexp.data.pair_lists import Pair, every_kind, make_pairs, read_pairs, set_aside
from qexp.data.tensors import Augment, Normalize, TensorLoader
from qexp.errors import QexpError

log = logging.getLogger(__name__)
_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp"}


class FacePairs(DataSet):
    """Aligned faces and the pairs of an evaluation protocol, such as LFW's 6,000 in ten folds.

    Three disjoint parts: pairs that are judged; `held_out` pairs, on whose images ranges are found and by which the best checkpoint is
    chosen; images to train on, labelled by person. Where the folder holds images that no pair of the list names, the held-out pairs and the
    training images are drawn from those, and the whole list is judged. Otherwise the held-out pairs are taken from the list, and every
    pair that shares an image with them is not judged; `left_out` counts both.

    Memory: each image once, as uint8 (LFW at 160 x 160: 0.6 GB for the images of its pairs).

    Args:
        root: Folder (or zip file) of images, `<person>/<person>_0001.jpg`.
        pairs: List of pairs, see `read_pairs`.
        size: Height and width of the network's input; images of another size are resized.
        batch_size: Training batch.
        eval_batch_size: Validation and test batch.
        mean, std: Mean and standard deviation of each channel, in the checkpoint's order, of images in 0..1.
        channel_order: Channel order of the checkpoint, `rgb` or `bgr`.
        folds: Folds to judge; null takes all.
        train_folds: Folds that give training images and are not judged.
        held_out: Pairs for calibration and validation; 0 judges every pair, and nothing can be calibrated.
        max_samples: Number of pairs to judge, taken equally from every fold and of both kinds.
        augment: `{padding: pixels, flip: true|false}` of the training part.
        seed: Seed of the draw, of order and augmentation.
        channels_last: Memory format of the batches.
    """

    def __init__(
        self,
        *,
        root: str,
        pairs: str,
        size: Sequence[int],
        batch_size: int,
        eval_batch_size: int,
        mean: Sequence[float],
        std: Sequence[float],
        channel_order: str = "rgb",
        folds: Sequence[int] | None = None,
        train_folds: Sequence[int] = (),
        held_out: int = 100,
        max_samples: int | None = None,
        augment: Mapping[str, Any] | None = None,
        seed: int = 0,
        channels_last: bool = False,
    ) -> None:
        super().__init__()
        if held_out < 0:
            raise QexpError(f"FacePairs: held_out={held_out} is not allowed; use 0 or more")
        self.root, self.list, self.size = Path(root), Path(pairs), tuple(size)
        self.normalize = Normalize(tuple(map(float, mean)), tuple(map(float, std)), channel_order=channel_order)
        self.batch_size, self.eval_batch_size, self.channels_last = batch_size, eval_batch_size, channels_last
        self.max_samples, self.seed = max_samples, seed
        self.check_max_samples("all pairs")
        self.folds, self.train_folds, self.held_out_count = folds, tuple(train_folds), held_out
        self.augment = Augment(**augment) if augment else None

    def setup(self, stage: str | None = None) -> None:
        """Reads the list and the images once, for all stages."""
        self.faces  # noqa: B018 - a cached property

    @cached_property
    def _parts(self) -> tuple[list[Pair], list[Pair], list[str]]:
        """The judged pairs, the held-out ones, and the images to train on."""
        pairs = read_pairs(self.list)
        known = sorted({p.fold for p in pairs})
        asked = known if self.folds is None else list(self.folds)
        if unknown := [f for f in [*asked, *self.train_folds] if f not in known]:
            raise QexpError(f"{self.list}: no fold {unknown[0]}; it has {', '.join(map(str, known))}")
        judged = [p for p in pairs if p.fold in asked and p.fold not in self.train_folds]
        named = {name for p in pairs for name in (p.a, p.b)}
        rest = sorted(self._names - named)
        if len(rest) >= 4 * self.held_out_count > 0:
            held = make_pairs(rest, self.held_out_count, self.seed)
        elif self.held_out_count:
            before = len(judged)
            held, judged = set_aside(judged, self.held_out_count, self.seed)
            log.info(
                "no images outside the list of pairs: %d pairs are held out for calibration, and %d that share an image with them",
                len(held),
                before - len(judged) - len(held),
            )
            self.left_out = before - len(judged)
        else:
            held = []
        used = {name for p in held for name in (p.a, p.b)}
        if self.train_folds:
            judged_names = {name for p in judged for name in (p.a, p.b)}
            trained = {n for p in pairs if p.fold in self.train_folds for n in (p.a, p.b)} - used - judged_names
        else:
            trained = set(rest) - used
        if not judged:
            raise QexpError(
                f"{self.list}: no pair is left to judge; held_out={self.held_out_count} and train_folds="
                f"{list(self.train_folds)} take them all: lower or leave out one"
            )
        return every_kind(judged, self.max_samples), held, sorted(trained)

    left_out = 0  # pairs of the list that are not judged, since calibration uses one of their images

    @property
    def pairs(self) -> list[Pair]:
        """The judged pairs, in the list's order."""
        return self._parts[0]

    @property
    def held_out(self) -> list[Pair]:
        """The pairs of calibration and validation."""
        return self._parts[1]

    @cached_property
    def places(self) -> dict[str, int]:
        """The position of each image in `faces`."""
        judged, held, trained = self._parts
        names = {name for p in [*judged, *held] for name in (p.a, p.b)} | set(trained)
        return {name: i for i, name in enumerate(sorted(names))}

    @cached_property
    def faces(self) -> Tensor:
        """The images of the three parts, uint8 `[N, 3, H, W]` in RGB."""
        missing = sorted(set(self.places) - self._names)
        if missing:
            raise QexpError(
                f"{self.root}: {len(missing)} images that {self.list.name} names are missing: {', '.join(missing[:3])}"
                f"{' ...' if len(missing) > 3 else ''}; bring the whole set, or choose other folds"
            )
        out = torch.empty(len(self.places), 3, *self.size, dtype=torch.uint8)
        for name, i in tqdm(self.places.items(), desc="faces", unit="image", leave=False, disable=len(out) < 2000):
            out[i] = self._decode(name)
        return out

    def _decode(self, name: str) -> Tensor:
        try:
            image, _ = rgb(self._source.read(name))
        except BadImage as error:
            raise QexpError(f"{self.root}: {name} is damaged or no image ({error})") from None
        if image.size != (self.size[1], self.size[0]):
            image = image.resize((self.size[1], self.size[0]), Image.Resampling.BILINEAR)
        return torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1)

    @cached_property
    def _source(self) -> Source:
        try:
            return Source(self.root)
        except QexpError:
            raise QexpError(
                f"root={self.root}: no folder and no zip file of faces (<person>/<person>_0001.jpg); bring the aligned crops there"
            ) from None

    @cached_property
    def _names(self) -> set[str]:
        return {n for n in self._source.names() if Path(n).suffix.lower() in _SUFFIXES}

    def _images_of(self, pairs: Sequence[Pair]) -> list[int]:
        return sorted({self.places[name] for p in pairs for name in (p.a, p.b)})

    @cached_property
    def people(self) -> Tensor:
        """Person number of each image of `faces`, `[N]`, for training images; -1 for the others."""
        labels = torch.full((len(self.places),), -1, dtype=torch.int64)
        who = sorted({Path(name).parent.name for name in self._parts[2]})
        number = {name: i for i, name in enumerate(who)}
        for name in self._parts[2]:
            labels[self.places[name]] = number[Path(name).parent.name]
        return labels

    def train_dataloader(self) -> TensorLoader:
        """The training images and their persons' numbers."""
        trained = (self.people >= 0).nonzero().flatten()
        if not len(trained):
            raise QexpError(
                f"{self.root}: every image belongs to a pair that is judged, so there is none to train on; name folds to train on "
                "(dataset.data.train_folds=[1]) or bring the whole image set"
            )
        judged = {Path(name).parent.name for p in self.pairs for name in (p.a, p.b)}
        both = judged & {Path(name).parent.name for name in self._parts[2]}
        if both:
            log.warning(
                "%d people in judged pairs also have training images: the accuracy does not hold for unknown people",
                len(both),
            )
        options = {"indices": trained, "augment": self.augment, "shuffle": True, "seed": self.seed}
        return TensorLoader(
            self.faces, self.people, self.batch_size, self.normalize, channels_last=self.channels_last, **options
        )

    def val_dataloader(self) -> TensorLoader:
        """The images of the held-out pairs, each once, and their positions."""
        return self._evaluate(self._images_of(self.held_out))

    def test_dataloader(self) -> TensorLoader:
        """The images of the judged pairs, each once, and their positions."""
        return self._evaluate(self._images_of(self.pairs))

    def _evaluate(self, indices: Sequence[int]) -> TensorLoader:
        positions = torch.arange(len(self.faces))
        options = {"indices": indices, "channels_last": self.channels_last}
        return TensorLoader(self.faces, positions, self.eval_batch_size, self.normalize, **options)

    def calibration_batches(self, n: int, batch_size: int, seed: int) -> list[Tensor]:
        """Images of the held-out pairs, in batches `[B, 3, H, W]`."""
        indices = np.array(self._images_of(self.held_out), dtype=np.int64)
        self.check_draw(n, len(indices), "dataset.data.held_out")
        chosen = np.random.default_rng(seed).permutation(indices)[:n]
        loader = TensorLoader(
            self.faces,
            torch.zeros(len(self.faces), dtype=torch.int64),
            batch_size,
            self.normalize,
            indices=torch.from_numpy(chosen),
            channels_last=self.channels_last,
        )
        return [images for images, _ in loader]

    def example(self) -> Tensor:
        """One input as the network sees it, `[1, 3, H, W]`."""
        return self.normalize(self.faces[:1])

    @property
    def preprocessing(self) -> dict[str, Any]:
        """The preprocessing of images."""
        return {**asdict(self.normalize), "size": list(self.size)}

    def notes(self) -> dict[str, Any]:
        """Columns about the images in the results."""
        rest = (
            "of other images"
            if not self.left_out
            else f"set aside from the list, with {self.left_out - len(self.held_out)} that share an image"
        )
        return {
            "calibration_from": f"{len(self.held_out)} pairs {rest}, seed {self.seed}",
            "pairs_left_out": self.left_out,
        }

    def content_hash(self) -> str:
        """Returns a hash of images, pairs and normalisation."""
        parts = [self.normalize.identity(), self.normalize.channel_order, *map(list, self._parts)]
        digest = hashlib.sha256(json.dumps(parts).encode())
        digest.update(self.faces.numpy())
        return digest.hexdigest()
