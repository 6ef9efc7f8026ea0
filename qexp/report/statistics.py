"""How sure an accuracy is: Wilson intervals, the exact paired test, the spread over seeds, ranks with their noise."""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd

Z95 = 1.959963984540054
# Student's t, 97.5 % quantile for 1..30 degrees of freedom; a study rarely has more than a handful of seeds.
T95 = (
    *(12.7062, 4.3027, 3.1824, 2.7764, 2.5706, 2.4469, 2.3646, 2.3060, 2.2622, 2.2281),
    *(2.2010, 2.1788, 2.1604, 2.1448, 2.1314, 2.1199, 2.1098, 2.1009, 2.0930, 2.0860),
    *(2.0796, 2.0739, 2.0687, 2.0639, 2.0595, 2.0555, 2.0518, 2.0484, 2.0452, 2.0423),
)
# What makes two points the same configuration up to the seed; columns a study lacks are ignored.
CELL = (
    *("study", "model", "dataset", "metric", "quant", "schedule", "layer_wbit", "layer_abit", "mean_wbit", "mean_abit"),
    *("ends_bit", "rounding", "granularity", "bn", "add", "quantize_input", "n_calibrate", "n_eval"),
)


def wilson(correct: float, n: int, z: float = Z95) -> tuple[float, float]:
    """Returns the Wilson score interval of `correct` hits in `n` trials, in percent; `(0, 100)` for no trial.

    Source: Wilson, Probable inference, the law of succession, and statistical inference, 1927, JASA 22(158).
    """
    if not 0 <= correct <= n:
        raise ValueError(f"wilson: correct must lie in [0, {n}], got {correct}")
    if n == 0:
        return 0.0, 100.0
    p, zz = correct / n, z * z
    centre = (p + zz / (2 * n)) / (1 + zz / n)
    half = z / (1 + zz / n) * math.sqrt(p * (1 - p) / n + zz / (4 * n * n))
    low = 0.0 if correct == 0 else max(0.0, centre - half)
    high = 1.0 if correct == n else min(1.0, centre + half)
    return 100 * low, 100 * high


class Paired(NamedTuple):
    """The outcome of a paired comparison: images only one of the two got right, `b - a` in points, and the p-value."""

    only_a: int
    only_b: int
    difference: float
    p: float


def mcnemar(a_correct: Sequence[bool], b_correct: Sequence[bool]) -> Paired:
    """Returns the exact two-sided McNemar test of two models on the same images.

    Args:
        a_correct: whether model a was right, one entry an image.
        b_correct: the same images in the same order for model b.

    Source: McNemar, Note on the sampling error of the difference between correlated proportions, 1947.
    """
    a, b = np.asarray(a_correct, dtype=bool), np.asarray(b_correct, dtype=bool)
    if a.shape != b.shape or a.ndim != 1 or not a.size:
        raise ValueError(f"mcnemar: needs two equally long non-empty 1-D sequences, got shapes {a.shape} and {b.shape}")
    only_a, only_b = int((a & ~b).sum()), int((b & ~a).sum())
    n, tail, term = only_a + only_b, 0, 1
    for k in range(min(only_a, only_b) + 1):  # integers throughout: exact for any number of discordant images
        tail += term
        term = term * (n - k) // (k + 1)
    return Paired(only_a, only_b, 100 * (only_b - only_a) / a.size, min(1.0, 2 * tail / (1 << n)))


def aggregate_seeds(df: pd.DataFrame) -> pd.DataFrame:
    """Returns one row a configuration: `mean`, `sd` (over seeds), `n`, `ci_low`, `ci_high`, and the `rows` it joins.

    Failed points are left out. The interval joins two independent doubts in quadrature: the spread over seeds
    (Student's t) and the finite test set (the mean of the points' own half widths), so one seed gives the point's
    own interval. Points that repeat a seed differ in something the columns do not name and stay apart.
    """
    ok = df[(df["status"] == "ok") & df["value"].notna()]
    keys = [name for name in CELL if name in ok.columns]
    cells = []
    for key, group in ok.groupby(keys, dropna=False, sort=False) if len(ok) else []:
        same_seed = "seed" not in group or group["seed"].duplicated().any()
        for part in [group.loc[[index]] for index in group.index] if same_seed else [group]:
            cells.append({**dict(zip(keys, key)), **_spread(part), "rows": list(part.index)})
    return pd.DataFrame(cells, columns=[*keys, "mean", "sd", "n", "ci_low", "ci_high", "rows"])


def ties(cells: pd.DataFrame, points: pd.DataFrame, correct: Mapping[str, np.ndarray]) -> tuple[int, list[int]] | None:
    """Returns the index of the best cell, and of those whose distance from it may be chance; None for fewer than two cells.

    Two cells of one point each on the same images: the exact McNemar test at 5 %, its p-value times the number of cells compared
    (Bonferroni). Cells of several seeds, or whose hits are not known: chance where the mean of one lies in the interval of the other.

    Args:
        cells: What `aggregate_seeds` returned.
        points: The rows it joined.
        correct: Which images were right, by point.
    """
    if len(cells) < 2:
        return None
    best = cells["mean"].idxmax()
    tied = []
    for index in cells.index.drop(best):
        pair = [[correct.get(points.at[row, "point"]) for row in cells.at[i, "rows"]] for i in (best, index)]
        hits = [found[0] for found in pair if len(found) == 1 and found[0] is not None and len(found[0])]
        if len(hits) == 2 and len(hits[0]) == len(hits[1]):
            chance = mcnemar(hits[1], hits[0]).p * (len(cells) - 1) >= 0.05
        else:
            a, b = cells.loc[best], cells.loc[index]
            chance = not (a["ci_low"] > b["mean"] and b["ci_high"] < a["mean"])
        if chance:
            tied.append(index)
    return best, tied


def seed_columns(df: pd.DataFrame) -> pd.DataFrame:
    """Returns `seeds, seed_mean, seed_sd, seed_ci_low, seed_ci_high` of the cell each row belongs to; gaps where it has one seed."""
    names = {"n": "seeds", "mean": "seed_mean", "sd": "seed_sd", "ci_low": "seed_ci_low", "ci_high": "seed_ci_high"}
    out = pd.DataFrame(math.nan, index=df.index, columns=list(names.values()))
    for cell in aggregate_seeds(df).to_dict("records"):
        if cell["n"] > 1:
            out.loc[cell["rows"]] = [cell[name] for name in names]
    return out.astype({"seeds": "Int64"})


def _spread(points: pd.DataFrame) -> dict[str, float]:
    """Returns mean, standard deviation, count and the interval of points that differ in the seed only."""
    value, n = points["value"].astype(float), len(points)
    mean = float(value.mean())
    below, above = (float((points[side].astype(float) - value).abs().mean()) for side in ("ci_low", "ci_high"))
    sd = float(value.std(ddof=1)) if n > 1 else math.nan
    seeds = (T95[n - 2] if n - 2 < len(T95) else Z95) * sd / math.sqrt(n) if n > 1 else 0.0
    low, high = (mean - math.hypot(seeds, _known(below)), mean + math.hypot(seeds, _known(above)))
    return {"mean": mean, "sd": sd, "n": n, "ci_low": low, "ci_high": high}


def _known(half_width: float) -> float:
    """Returns the half width, or 0 where no interval was recorded."""
    return 0.0 if math.isnan(half_width) else half_width


def rank_ranges(value: Sequence[float], low: Sequence[float], high: Sequence[float]) -> list[tuple[int, int]]:
    """Returns the best and the worst rank (1 = highest value) each entry may have, given the intervals.

    Entry j is surely better than i if its whole interval lies above i's; what is not sure is left open. Intervals
    of models tested on the same images overlap sooner than a paired test would say, so this errs towards a tie.
    """
    low = np.where(np.isnan(np.asarray(low, float)), value, low)
    high = np.where(np.isnan(np.asarray(high, float)), value, high)
    lows, highs = np.sort(low), np.sort(high)
    surely_better = len(lows) - np.searchsorted(lows, high, side="right")
    surely_worse = np.searchsorted(highs, low, side="left")
    return [(int(b) + 1, len(lows) - int(w)) for b, w in zip(surely_better, surely_worse)]
