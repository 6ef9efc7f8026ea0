"""How much each tensor alone hurts at each width: the measure every search starts from."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from typing import Any

import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from qexp.layers.swap import evaluating
from qexp.network.facts import Facts
from qexp.search.replay import Replay, bytes_an_image
from qexp.search.shelf import Key, Shelf

log = logging.getLogger(__name__)
COLUMNS = ("layer", "site", "bits", "divergence", "sqnr", "agree", "top1", "drop")


def sensitivity(
    shelf: Shelf,
    facts: Facts,
    batches: Iterable[tuple[Tensor, Any]],
    keys: Sequence[Key] | None = None,
    memory_mb: int = 1024,
    progress: bool = True,
) -> pd.DataFrame:
    """Returns what one tensor at one width does to the float network, one row a (layer, site, bits).

    Layers before the quantized one are not computed again (see `Replay`), so the whole table costs about half of one evaluation of these
    images for each row. Images should be of the training side: what is chosen by this table is judged on the test images.

    Columns: `divergence`, for classifiers the mean Kullback-Leibler divergence from the float network's output distribution (nats), else
    the mean squared error of the result over its power; `sqnr` of the result (dB); and for classifiers with labels `agree`, the share of
    images whose class stays (%), `top1` (%) and `drop` against the float network (points).

    Args:
        shelf: Quantizers at every width.
        facts: Of the model.
        batches: Images and labels, `([N, C, H, W], [N])`; labels of another kind are not looked at.
        keys: Tensors to examine; None takes all the shelf has.
        memory_mb: Bound on the layer results held at once, in MiB; larger batches are cut.
        progress: Show a progress bar.
    """
    keys = list(shelf.keys if keys is None else keys)
    cases = [(key, bits) for key in keys for bits in shelf.widths]
    sums = {case: Score() for case in cases}
    base = Score()
    size = max(1, int(memory_mb * 2**20 / max(bytes_an_image(facts), 1)))
    cut = list(_cut(batches, size))
    images_seen = sum(len(images) for images, _ in cut)
    replay = Replay(shelf.model, facts)
    bar = tqdm(total=len(cases) * images_seen, desc="sensitivity", unit="image", unit_scale=True, disable=not progress)
    with evaluating(shelf.model), bar:
        for images, labels in cut:
            shelf.nothing()
            target = replay.first(images)
            base.add(target, target, labels)
            for key, bits in cases:
                shelf.alone(key, bits)
                sums[key, bits].add(replay.again(images, key[0]), target, labels)
                bar.update(len(images))
    shelf.restore()
    shelf.close()
    rows = []
    for (layer, site), bits in cases:
        row = sums[(layer, site), bits].row()
        drop = None if row["top1"] is None else base.row()["top1"] - row["top1"]
        rows.append({"layer": layer, "site": site, "bits": bits, **row, "drop": drop})
    return pd.DataFrame(rows, columns=COLUMNS)


def ranked(table: pd.DataFrame) -> pd.DataFrame:
    """Returns the tensors from the most sensitive to the least: their divergence at the narrowest width examined."""
    worst = table[table.bits == table.bits.min()]
    return worst.sort_values("divergence", ascending=False, ignore_index=True)


class Score:
    """How far results are from the float network's, as sums over images: batches of any size give the same means."""

    def __init__(self) -> None:
        self.n, self.divergence, self.error, self.power = 0, 0.0, 0.0, 0.0
        self.agree, self.right, self.labelled = 0, 0, 0

    def add(self, y: Tensor, target: Tensor, labels: Any) -> None:
        """Adds a batch of results, the float network's, and the labels."""
        y, target = y.double(), target.double()
        self.n += len(y)
        self.error += float((y - target).square().sum())
        self.power += float(target.square().sum())
        if y.ndim != 2:
            return
        log_q, log_p = F.log_softmax(y, 1), F.log_softmax(target, 1)
        self.divergence += float((log_p.exp() * (log_p - log_q)).sum())
        chosen = y.argmax(1)
        self.agree += int((chosen == target.argmax(1)).sum())
        if isinstance(labels, Tensor) and labels.shape == chosen.shape:
            self.right += int((chosen == labels).sum())
            self.labelled += len(labels)

    def row(self) -> dict[str, float | None]:
        """Returns divergence, sqnr, agree and top1; None for what such results do not have."""
        classifier = self.divergence > 0 or self.agree > 0
        relative = self.error / self.power if self.power else 0.0
        return {
            "divergence": max(self.divergence / self.n, 0.0) if classifier else relative,
            "sqnr": -10 * float(torch.log10(torch.tensor(relative, dtype=torch.float64))) if relative > 0 else None,
            "agree": 100 * self.agree / self.n if classifier else None,
            "top1": 100 * self.right / self.labelled if self.labelled else None,
        }


def _cut(batches: Iterable[tuple[Tensor, Any]], size: int) -> Iterable[tuple[Tensor, Any]]:
    for images, labels in batches:
        for at in range(0, len(images), size):
            yield images[at : at + size], labels[at : at + size]
