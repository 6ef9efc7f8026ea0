"""Measures the loss that each tensor alone causes at each width: the start of every search."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from typing import Any

import pandas as pd
import torch
from torch import Tensor
from tqdm import tqdm

from qexp.layers.swap import evaluating
from qexp.network.facts import Facts
from qexp.results.judging import Judge, Judging, differing
from qexp.search.quantizers_by_width import Key, QuantizersByWidth
from qexp.search.replay import Replay, bytes_an_image

log = logging.getLogger(__name__)
COLUMNS = ("layer", "site", "bits", "divergence", "sqnr", "agree", "value", "drop")


def sensitivity(
    shelf: QuantizersByWidth,
    facts: Facts,
    batches: Iterable[tuple[Tensor, Any]],
    keys: Sequence[Key] | None = None,
    memory_mb: int = 1024,
    progress: bool = True,
    judge: Judge | None = None,
) -> pd.DataFrame:
    """Returns the effect of one tensor at one width on the float network, one row per (layer, site, bits).

    Layers before the quantized one are not computed again (see `Replay`), so the whole table costs about half of one evaluation of these
    images for each row. Use images of the training side: choices made from this table are judged on the test images.

    Columns: `divergence` from the float network by the task's own measure (of classes the mean Kullback-Leibler divergence, nats), else the
    mean squared error of the result over its power; `sqnr` of the result (dB); `agree`, the share of images whose decision stays (%);
    `value`, the task's score (a share in percent), and `drop`, how much worse it is than the float network's. Values that the task cannot
    compute (it has no decisions, or cannot judge outputs alone) are None.

    Args:
        shelf: Quantizers at every width.
        facts: Of the model.
        batches: Images `[N, C, H, W]` and targets, as the task takes them.
        keys: Tensors to examine; None takes all tensors of the shelf.
        memory_mb: Limit of the layer results held at once, in MiB; larger batches are split.
        progress: Show a progress bar.
        judge: The network's task; without one results are compared as numbers alone.
    """
    keys = list(shelf.keys if keys is None else keys)
    cases = [(key, bits) for key in keys for bits in shelf.widths]
    sums = {case: Comparison(judge) for case in cases}
    base = Comparison(judge)
    size = max(1, int(memory_mb * 2**20 / max(bytes_an_image(facts), 1)))
    cut = list(_cut(batches, size))
    images_seen = sum(len(images) for images, _ in cut)
    replay = Replay(shelf.model, facts)
    bar = tqdm(total=len(cases) * images_seen, desc="sensitivity", unit="image", unit_scale=True, disable=not progress)
    with evaluating(shelf.model), bar:
        for images, targets in cut:
            shelf.nothing()
            target = replay.first(images)
            base.add(target, target, targets)
            for key, bits in cases:
                shelf.alone(key, bits)
                sums[key, bits].add(replay.again(images, key[0]), target, targets)
                bar.update(len(images))
    shelf.restore()
    shelf.close()
    rows, of_float = [], base.row()["value"]
    for (layer, site), bits in cases:
        row = sums[(layer, site), bits].row()
        drop = None if row["value"] is None else judge.measure.lost(row["value"], of_float)
        rows.append({"layer": layer, "site": site, "bits": bits, **row, "drop": drop})
    return pd.DataFrame(rows, columns=COLUMNS)


def ranked(table: pd.DataFrame) -> pd.DataFrame:
    """Returns the tensors from the most sensitive to the least: their divergence at the narrowest width examined."""
    worst = table[table.bits == table.bits.min()]
    return worst.sort_values("divergence", ascending=False, ignore_index=True)


class Comparison:
    """Accumulates the distance of results from the float network's as sums over images, so that batch sizes do not matter.

    Args:
        judge: The network's task; None compares numbers alone.
    """

    def __init__(self, judge: Judge | None = None) -> None:
        self.judge, self.judging = judge, Judging(judge)
        self.n, self.error, self.power = 0, 0.0, 0.0
        self.divergence: float | None = 0.0
        self.agree: int | None = 0

    def add(self, y: Tensor, wanted: Tensor, targets: Any) -> None:
        """Adds one batch: the results, the float network's results, and the targets."""
        self.judging.add(y, targets)
        y, wanted = y.double(), wanted.double()
        self.n += len(y)
        self.error += float((y - wanted).square().sum())
        self.power += float(wanted.square().sum())
        apart = self.judge.divergence(y, wanted) if self.judge else None
        self.divergence = None if apart is None else self.divergence + float(apart.sum())
        differ = differing(self.judge.decisions(y), self.judge.decisions(wanted)) if self.judge else None
        self.agree = None if differ is None else self.agree + len(y) - differ

    def row(self) -> dict[str, float | None]:
        """Returns divergence, sqnr, agree and value; None for measures that such results do not have."""
        relative = self.error / self.power if self.power else 0.0
        return {
            "divergence": relative if self.divergence is None else max(self.divergence / max(self.n, 1), 0.0),
            "sqnr": -10 * float(torch.log10(torch.tensor(relative, dtype=torch.float64))) if relative > 0 else None,
            "agree": None if self.agree is None else 100 * self.agree / max(self.n, 1),
            "value": self.judging.stored,
        }


def _cut(batches: Iterable[tuple[Tensor, Any]], size: int) -> Iterable[tuple[Tensor, Any]]:
    for images, targets in batches:
        for at in range(0, len(images), size):
            yield images[at : at + size], targets[at : at + size]
