"""Confidence in scores: Wilson intervals, the exact paired test, the spread over seeds, ranks with their noise."""

import functools
import math
from collections.abc import Mapping, Sequence
from statistics import NormalDist
from typing import NamedTuple

import numpy as np
import pandas as pd

from qexp.results.measure import Measure

Z95 = 1.959963984540054
PAIRED = 1000  # entries that are ranked by their answers to the same images, each against each
# Student's t, 97.5 % quantile for 1..30 degrees of freedom; studies rarely have more than a few seeds.
T95 = (
    *(12.7062, 4.3027, 3.1824, 2.7764, 2.5706, 2.4469, 2.3646, 2.3060, 2.2622, 2.2281),
    *(2.2010, 2.1788, 2.1604, 2.1448, 2.1314, 2.1199, 2.1098, 2.1009, 2.0930, 2.0860),
    *(2.0796, 2.0739, 2.0687, 2.0639, 2.0595, 2.0555, 2.0518, 2.0484, 2.0452, 2.0423),
)
# Columns in which points of one configuration are equal for every seed; columns that a study lacks are ignored.
CELL = (
    *(
        "study",
        "model",
        "dataset",
        "metric",
        *("metric_label", "unit", "is_share", "higher_is_better"),
        "quant",
        "schedule",
        "layer_wbit",
        "layer_abit",
        "mean_wbit",
        "mean_abit",
        "quantized_macs",
    ),
    *("plan", "ends_bit", "rounding", "granularity", "bn", "add", "quantize_input", "n_calibrate", "n_eval", "weights"),
)

# Columns in which points with the same float network are equal.
REFERENCE = (
    *("study", "model", "dataset", "metric", "metric_label", "unit", "is_share", "higher_is_better"),
    *("weights", "reference", "n_eval"),
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
        a_correct: whether model a was right, one entry per image.
        b_correct: the same images in the same order for model b.

    Source: McNemar, Note on the sampling error of the difference between correlated proportions, 1947.
    """
    a, b = np.asarray(a_correct, dtype=bool), np.asarray(b_correct, dtype=bool)
    if a.shape != b.shape or a.ndim != 1 or not a.size:
        raise ValueError(f"mcnemar: needs two equally long non-empty 1-D sequences, got shapes {a.shape} and {b.shape}")
    only_a, only_b = int((a & ~b).sum()), int((b & ~a).sum())
    return Paired(only_a, only_b, 100 * (only_b - only_a) / a.size, sign_test(only_a, only_b))


@functools.lru_cache(maxsize=65536)
def sign_test(a: int, b: int) -> float:
    """Returns the exact two-sided probability of a split of `a + b` fair tosses at least as uneven as this one."""
    n, tail, term = a + b, 0, 1
    for k in range(min(a, b) + 1):  # integers throughout: exact for any number of tosses
        tail += term
        term = term * (n - k) // (k + 1)
    return min(1.0, 2 * tail / (1 << n))


def aggregate_seeds(df: pd.DataFrame) -> pd.DataFrame:
    """Returns one row per configuration: `mean`, `sd` (over seeds), `n`, `ci_low`, `ci_high`, and the `rows` it joins.

    Failed points are left out. The interval joins two independent uncertainties in quadrature: the spread over seeds
    (Student's t) and the finite test set (the mean of the points' own half widths), so one seed gives the point's
    own interval. Intervals of shares are clipped to 0..100, which few seeds far apart would exceed.
    Points that repeat a seed differ in something that the columns do not name, and stay separate.
    """
    ok = df[(df["status"] == "ok") & df["value"].notna()]
    keys = [name for name in CELL if name in ok.columns and ok[name].notna().any()]
    cells = []
    if len(ok):  # rows by their places: a table per group would take most of the time of a large study
        index, columns, shares = ok.index.to_numpy(), _ends(ok), _shares(ok)
        seeds = ok["seed"].tolist() if "seed" in ok else [None] * len(ok)
        grouped = ok.groupby(keys, dropna=False, sort=False)
        names = grouped.size().index.tolist()
        numbers = grouped.ngroup().to_numpy()
        order = np.argsort(numbers, kind="stable")
        for key, places in zip(names, np.split(order, np.flatnonzero(np.diff(numbers[order])) + 1), strict=True):
            key = key if len(keys) > 1 else (key,)
            same_seed = len({seeds[place] for place in places}) < len(places) or "seed" not in ok
            for part in [places[i : i + 1] for i in range(len(places))] if same_seed else [places]:
                spread = _spread(*(column[part] for column in columns), shares[part[0]])
                cells.append({**dict(zip(keys, key)), **spread, "rows": [int(i) for i in index[part]]})
    return pd.DataFrame(cells, columns=[*keys, "mean", "sd", "n", "ci_low", "ci_high", "rows"])


def _ends(points: pd.DataFrame) -> list[np.ndarray]:
    """Returns the points' values and the ends of their intervals."""
    return [points[name].to_numpy(float, na_value=math.nan) for name in ("value", "ci_low", "ci_high")]


def _shares(points: pd.DataFrame) -> list[bool]:
    """Returns whether each point's numbers are shares in percent."""
    about = [name for name in ("metric", "metric_label", "unit", "is_share", "higher_is_better") if name in points]
    return [Measure.of(row).is_share for row in points[about].to_dict("records")]


def ties(cells: pd.DataFrame, points: pd.DataFrame, correct: Mapping[str, np.ndarray]) -> tuple[int, list[int]] | None:
    """Returns the index of the best cell, and of the cells whose distance from it may be chance; None for fewer than two cells.

    `surely_better` decides; cells with several seeds are compared by their intervals.

    Args:
        cells: The table that `aggregate_seeds` returned.
        points: The rows that it joined.
        correct: Which images were right, by point.
    """
    if len(cells) < 2:
        return None
    measure = Measure.of(points.loc[cells["rows"].iloc[0][0]])
    best = (cells["mean"] * measure.sign).idxmax()
    ends = (cells[name].to_numpy(float) for name in ("mean", "ci_low", "ci_high"))
    place = list(cells.index).index(best)
    sure = surely_better(*upwards(*ends, measure), hits_of(cells, points, correct), of=[place])[0]
    return best, [index for i, index in enumerate(cells.index) if i != place and not sure[i]]


def upwards(
    value: np.ndarray, low: np.ndarray, high: np.ndarray, measure: Measure
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns values and intervals for which more is better: the sign changes for a metric where less is better."""
    return (value, low, high) if measure.higher_is_better else (-value, -high, -low)


def hits_of(cells: pd.DataFrame, points: pd.DataFrame, correct: Mapping[str, np.ndarray]) -> list[np.ndarray | None]:
    """Returns which images each cell got right; None for a cell with several seeds or with unknown hits."""
    return [correct.get(points.at[rows[0], "point"]) if len(rows) == 1 else None for rows in cells["rows"]]


def seed_columns(df: pd.DataFrame) -> pd.DataFrame:
    """Returns `seeds, seed_mean, seed_sd, seed_ci_low, seed_ci_high` of the cell each row belongs to; gaps where it has one seed."""
    names = {"n": "seeds", "mean": "seed_mean", "sd": "seed_sd", "ci_low": "seed_ci_low", "ci_high": "seed_ci_high"}
    cells = aggregate_seeds(df)
    several = cells[cells["n"] > 1].explode("rows") if len(cells) else cells
    out = several[list(names)].set_axis(pd.Index(several["rows"], dtype=df.index.dtype)).rename(columns=names)
    return out.reindex(df.index).astype(float).astype({"seeds": "Int64"})


def float_references(df: pd.DataFrame) -> pd.DataFrame:
    """Returns one row per float network that points were compared with: `mean`, `sd`, `n`, `ci_low`, `ci_high`, its names.

    Runs from the same weights share one, also with different seeds. Networks that were trained once per seed are joined in the way
    in which `aggregate_seeds` joins points.
    """
    known = df[(df["status"] == "ok") & df["value_float"].notna()]
    keys = [name for name in REFERENCE if name in known.columns and known[name].notna().any()]
    rows = []
    for key, group in known.groupby(keys, dropna=False, sort=False) if len(known) else []:
        one = group.drop_duplicates(["value_float", *(["seed"] if "seed" in group else [])])
        if one["value_float"].nunique() == 1:
            one = one.head(1)
        sides = {side: one.get(f"{side}_float", pd.Series(math.nan, one.index)) for side in ("ci_low", "ci_high")}
        joined = one.assign(value=one["value_float"], **sides)
        rows.append({**dict(zip(keys, key)), **_spread(*_ends(joined), _shares(joined)[0])})
    return pd.DataFrame(rows, columns=[*keys, "mean", "sd", "n", "ci_low", "ci_high"])


def _spread(value: np.ndarray, low: np.ndarray, high: np.ndarray, is_share: bool) -> dict[str, float]:
    """Returns mean, standard deviation, count and the interval of points that differ in the seed only."""
    n, mean = len(value), float(value.mean())
    below, above = (_mean_distance(end, value) for end in (low, high))
    sd = float(value.std(ddof=1)) if n > 1 else math.nan
    seeds = (T95[n - 2] if n - 2 < len(T95) else Z95) * sd / math.sqrt(n) if n > 1 else 0.0
    low, high = (mean - math.hypot(seeds, below), mean + math.hypot(seeds, above))
    if is_share:
        low, high = max(0.0, low), min(100.0, high)
    return {"mean": mean, "sd": sd, "n": n, "ci_low": low, "ci_high": high}


def _mean_distance(end: np.ndarray, value: np.ndarray) -> float:
    """Returns the mean half width of intervals, 0 where none was recorded."""
    distance = np.abs(end - value)
    known = distance[~np.isnan(distance)]
    return float(known.mean()) if len(known) else 0.0


def surely_better(
    value: Sequence[float],
    low: Sequence[float],
    high: Sequence[float],
    hits: Sequence[np.ndarray | None] | None = None,
    of: Sequence[int] | None = None,
    others: int | None = None,
) -> np.ndarray:
    """Returns `[n, n]` booleans: whether entry i is better than entry j beyond chance.

    Two entries with known hits on the same images are compared by the exact McNemar test at 5 %, with its p-value times the number of
    others (Bonferroni). For any other two, the whole interval of one has to lie above that of the other. Intervals of models tested on
    the same images overlap more often than a paired test finds no difference, so this errs towards a tie.

    Args:
        value: Scores of which more is better, see `upwards`.
        low, high: Their intervals; an unknown one (NaN) counts as the value itself.
        hits: Which images each got right, booleans `[images]`, or None.
        of: The entries i to compare with all others; all by default.
        others: Number of others that an entry is compared with, where these entries are only some of them.
    """
    low, high = _known_ends(value, low, high)
    rows = np.arange(len(low)) if of is None else np.asarray(of)
    sure = low[rows, None] > high[None, :]
    others = len(low) - 1 if others is None else others
    images: dict[int, list[int]] = {}
    for i, hit in enumerate(hits or ()):
        if hit is not None and len(hit):
            images.setdefault(len(hit), []).append(i)
    for group in images.values():
        mine = np.flatnonzero(np.isin(rows, group))
        if len(group) > 1 and len(mine):
            right = np.stack([hits[i] for i in group]).astype(np.float32)
            ours = right[np.searchsorted(group, rows[mine])]
            won = np.rint(ours @ (1 - right).T).astype(int)  # [i, j]: images that i got right and j did not
            lost = np.rint((1 - ours) @ right.T).astype(int)
            sure[np.ix_(mine, group)] = _beyond_chance(won, lost, others)
    return sure


def _known_ends(value: Sequence[float], low: Sequence[float], high: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
    """Returns the ends of intervals; the value itself where one is unknown."""
    return tuple(np.where(np.isnan(np.asarray(end, float)), value, end) for end in (low, high))


def _beyond_chance(won: np.ndarray, lost: np.ndarray, comparisons: int) -> np.ndarray:
    """Returns where `won` of `won + lost` is too many for chance; tests exactly unless the normal limit is far from the threshold."""
    total = won + lost
    critical = NormalDist().inv_cdf(1 - 0.025 / comparisons)
    z = (won - lost - 1) / np.sqrt(np.maximum(total, 1))
    sure = z > critical
    near = (won > lost) & ((total < 50) | (np.abs(z - critical) < 0.5))
    pairs, place = np.unique(np.stack([won[near], lost[near]]), axis=1, return_inverse=True)  # few of them differ
    tested = [sign_test(a, b) * comparisons < 0.05 for a, b in pairs.T.tolist()]
    sure[near] = np.array(tested, dtype=bool)[place.reshape(-1)]
    return sure


def rank_ranges(
    value: Sequence[float],
    low: Sequence[float],
    high: Sequence[float],
    hits: Sequence[np.ndarray | None] | None = None,
) -> list[tuple[int, int]]:
    """Returns the best and the worst rank (1 = highest value, see `upwards`) of each entry, from `surely_better`.

    Of more than `PAIRED` entries, the best ones are compared with each other in this way, and all other pairs by their intervals, so
    that the time grows with the entries and not with their square.
    """
    value = np.asarray(value, float)
    low, high = _known_ends(value, low, high)
    best = np.argsort(-value, kind="stable")[:PAIRED]
    above, below = _by_intervals(low, high)
    above_best, below_best = _by_intervals(low[best], high[best])
    sure = surely_better(
        value[best], low[best], high[best], None if hits is None else [hits[i] for i in best], others=len(value) - 1
    )
    above[best] += sure.sum(0) - above_best
    below[best] += sure.sum(1) - below_best
    return [(int(more) + 1, len(value) - int(less)) for more, less in zip(above, below)]


def _by_intervals(low: np.ndarray, high: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns the number of entries whose whole interval lies above each one's, and the number of those below."""
    above = len(low) - np.searchsorted(np.sort(low), high, side="right")
    return above, np.searchsorted(np.sort(high), low, side="left")
