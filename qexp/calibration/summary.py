"""Calibration statistics as a readable table."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import pandas as pd
from torch import Tensor

from qexp.statistics.stats import TensorStats

MEASURES = ("min", "max", "mean", "std", "mean_abs", "b", "kurtosis")


def summary(seen: Mapping[tuple[str, str], Any]) -> pd.DataFrame:
    """Returns one row per activation: measures of the whole tensor, and the least, mean and greatest of each over its channels.

    `b` is the mean absolute deviation `E|x - E x|`, `kurtosis` the excess over a normal distribution's. Columns: layer, site, count,
    channels, the measures, and `<measure>_channels_min`, `_mean`, `_max`. Where calls of one layer have different numbers of channels,
    the channel columns are empty.

    Args:
        seen: Statistics by (layer, site), as `Calibration` holds them.
    """
    rows = []
    for layer, site in sorted(seen):
        tensor, channel = seen[layer, site].tensor, seen[layer, site].channel
        if tensor.empty:
            continue
        found = tensor.remember("summary", partial(_measures, tensor))
        found = found | ({} if channel.empty else channel.remember("summary", partial(_over_channels, channel)))
        rows.append({"layer": layer, "site": site, **found})
    ends = [f"{measure}_channels_{end}" for measure in MEASURES for end in ("min", "mean", "max")]
    table = pd.DataFrame(rows, columns=["layer", "site", "count", "channels", *MEASURES, *ends])
    return table.astype({"channels": "Int64"})


def _measures(tensor: TensorStats) -> dict[str, float]:
    return {"count": int(tensor.count.sum())} | {measure: float(_of(tensor, measure)[0]) for measure in MEASURES}


def _over_channels(channel: TensorStats) -> dict[str, float]:
    row: dict[str, float] = {"channels": channel.count.numel()}
    for measure in MEASURES:
        each = _of(channel, measure)
        row |= {f"{measure}_channels_{end}": float(getattr(each, end)()) for end in ("min", "mean", "max")}
    return row


def _of(stats: TensorStats, measure: str) -> Tensor:
    return getattr(stats, measure).double().cpu().flatten()
