"""Intervals, tests and ranks against numbers worked out by hand."""

import math

import numpy as np
import pandas as pd
import pytest

from qexp.results import confidence
from qexp.results.confidence import (
    aggregate_seeds,
    float_references,
    mcnemar,
    rank_ranges,
    seed_columns,
    surely_better,
    ties,
    wilson,
)


@pytest.mark.parametrize(
    ("correct", "n", "low", "high"),
    [
        (8, 10, 49.0162, 94.3318),  # (0.8 + 0.19207 -+ 1.95996 * 0.160011) / 1.384146
        (0, 10, 0.0, 27.7533),  # z^2 / (n + z^2) = 3.841459 / 13.841459
        (10, 10, 72.2467, 100.0),
        (9173, 10_000, 91.1736, 92.2542),
    ],
)
def test_wilson_interval(correct: int, n: int, low: float, high: float) -> None:
    assert wilson(correct, n) == pytest.approx((low, high), abs=5e-4)


def test_wilson_of_nothing_says_nothing() -> None:
    assert wilson(0, 0) == (0.0, 100.0)


@pytest.mark.parametrize("correct", [-1, 11])
def test_wilson_refuses_more_hits_than_trials(correct: int) -> None:
    with pytest.raises(ValueError, match=r"must lie in \[0, 10\]"):
        wilson(correct, 10)


def test_mcnemar_counts_discordant_images_only() -> None:
    both, neither = [True] * 50, [False] * 43
    a = both + neither + [True] + [False] * 6
    b = both + neither + [False] + [True] * 6
    result = mcnemar(a, b)
    assert (result.only_a, result.only_b, result.difference) == (1, 6, pytest.approx(5.0))
    assert result.p == 2 * (1 + 7) / 2**7


@pytest.mark.parametrize(("only_a", "only_b", "p"), [(0, 10, 2 / 1024), (5, 5, 1.0), (0, 0, 1.0), (0, 1, 1.0)])
def test_mcnemar_p_values(only_a: int, only_b: int, p: float) -> None:
    a = np.array([1] * only_a + [0] * only_b + [1], dtype=bool)
    b = np.array([0] * only_a + [1] * only_b + [1], dtype=bool)
    assert mcnemar(a, b).p == p


def test_mcnemar_is_exact_for_many_images() -> None:
    a = np.zeros(10_000, dtype=bool)
    a[:4900] = True
    # The normal approximation gives z = 200 / sqrt(10000) = 2, p = 0.0455; exact is a little above.
    assert mcnemar(a, ~a).p == pytest.approx(0.0466, abs=2e-4)


def test_mcnemar_needs_the_same_images() -> None:
    with pytest.raises(ValueError, match="equally long"):
        mcnemar([True], [True, False])


def points(values: list[float], seeds: list[int], half: float = 0.5, **columns: list) -> pd.DataFrame:
    """Returns rows of one configuration."""
    frame = {"quant": "lsq", "layer_wbit": 4, "status": "ok", "value": values, "seed": seeds, **columns}
    df = pd.DataFrame(frame)
    return df.assign(ci_low=df["value"] - half, ci_high=df["value"] + half)


def test_seeds_are_joined_with_both_doubts() -> None:
    (cell,) = aggregate_seeds(points([90.0, 91.0, 92.0], [0, 1, 2])).to_dict("records")
    assert (cell["mean"], cell["sd"], cell["n"], cell["rows"]) == (91.0, 1.0, 3, [0, 1, 2])
    half = math.hypot(4.3027 / math.sqrt(3), 0.5)
    assert (cell["ci_low"], cell["ci_high"]) == pytest.approx((91 - half, 91 + half))


def test_one_seed_keeps_its_own_interval() -> None:
    (cell,) = aggregate_seeds(points([90.0], [0])).to_dict("records")
    assert math.isnan(cell["sd"])
    assert (cell["n"], cell["ci_low"], cell["ci_high"]) == (1, 89.5, 90.5)


def test_points_that_repeat_a_seed_are_not_taken_for_seeds() -> None:
    cells = aggregate_seeds(points([90.0, 80.0], [0, 0]))
    assert list(cells["n"]) == [1, 1]
    assert list(cells["mean"]) == [90.0, 80.0]


def test_failed_points_are_not_averaged() -> None:
    df = points([90.0, 92.0, 0.0], [0, 1, 2])
    df.loc[2, "status"] = "failed"
    assert list(aggregate_seeds(df)["mean"]) == [91.0]
    assert aggregate_seeds(df.iloc[2:]).empty


def test_different_widths_are_different_cells() -> None:
    df = points([90.0, 80.0], [0, 1])
    df["layer_wbit"] = [8, 2]
    assert list(aggregate_seeds(df)["n"]) == [1, 1]


def test_different_plans_of_the_same_mean_bits_are_different_cells() -> None:
    df = points([90.0, 80.0, 91.0], [0, 1, 1])
    df["plan"] = ["x.csv@3fa2b1", "x.csv@77aa00", "x.csv@3fa2b1"]
    assert list(aggregate_seeds(df)["n"]) == [2, 1]


def test_ranks_leave_open_what_the_intervals_leave_open() -> None:
    value = [92.0, 91.8, 90.0, 50.0]
    low, high = [91.5, 91.3, 89.4, 49.0], [92.5, 92.3, 90.6, 51.0]
    assert rank_ranges(value, low, high) == [(1, 2), (1, 2), (3, 3), (4, 4)]


def test_noise_is_not_transitive() -> None:
    assert rank_ranges([3.0, 2.0, 1.0], [2.4, 1.4, 0.4], [3.6, 2.6, 1.6]) == [(1, 2), (1, 3), (2, 3)]


def test_values_without_interval_are_ranked_as_they_are() -> None:
    nothing = [math.nan] * 3
    assert rank_ranges([1.0, 3.0, 2.0], nothing, nothing) == [(3, 3), (1, 1), (2, 2)]


def _points(rows: list[tuple[str, int, float]]) -> pd.DataFrame:
    """Points of a method and a seed with a value and an interval of 1 point to each side."""
    columns = {
        "status": "ok",
        "study": "s",
        "model": "m",
        "dataset": "d",
        "metric": "top1",
        "layer_wbit": 4,
        "layer_abit": 4,
    }
    made = [
        {**columns, "quant": q, "seed": s, "value": v, "ci_low": v - 1, "ci_high": v + 1, "point": f"{q}{s}"}
        for q, s, v in rows
    ]
    return pd.DataFrame(made)


def test_a_difference_on_the_same_images_is_told_where_intervals_overlap():
    """99 images only `a` gets right of 1000 both were asked: certain, though 1-point intervals around 90 and 89.5 overlap."""
    points = _points([("a", 0, 90.0), ("b", 0, 89.5), ("c", 0, 89.9)])
    hits = np.ones(1000, bool)
    fewer, others = hits.copy(), hits.copy()
    fewer[:50] = False
    others[0] = False
    best, tied = ties(aggregate_seeds(points), points, {"a0": hits, "b0": fewer, "c0": others})
    cells = aggregate_seeds(points)
    assert cells.at[best, "quant"] == "a" and [cells.at[i, "quant"] for i in tied] == ["c"]
    best, tied = ties(cells, points, {})
    assert len(tied) == 2, "without the hits the intervals leave both open"


def test_seeds_are_compared_by_their_intervals():
    points = _points([("a", 0, 90.0), ("a", 1, 90.2), ("b", 0, 80.0), ("b", 1, 80.4), ("c", 0, 89.0), ("c", 1, 91.0)])
    cells = aggregate_seeds(points)
    best, tied = ties(cells, points, {name: np.ones(10, bool) for name in points["point"]})
    assert cells.at[best, "quant"] == "a" and [cells.at[i, "quant"] for i in tied] == ["c"]
    assert ties(cells.head(1), points, {}) is None


def test_rows_know_what_their_seeds_come_to():
    columns = seed_columns(_points([("a", 0, 90.0), ("a", 1, 92.0), ("b", 0, 80.0)]))
    assert list(columns.seeds[:2]) == [2, 2] and columns.seeds.isna()[2]
    assert columns.seed_mean[0] == 91 and columns.seed_sd[1] == pytest.approx(2**0.5)
    assert columns.seed_ci_low[0] < 90 < 92 < columns.seed_ci_high[0]


def test_the_shortcut_for_many_images_says_what_the_exact_test_says():
    rng = np.random.default_rng(0)
    hits = list(rng.random((12, 800)) < np.linspace(0.5, 0.62, 12)[:, None])
    value = [100 * hit.mean() for hit in hits]
    sure = surely_better(value, [0.0] * 12, [100.0] * 12, hits)
    for i in range(12):
        for j in range(12):
            assert sure[i, j] == (value[i] > value[j] and 11 * mcnemar(hits[i], hits[j]).p < 0.05)
    assert 0 < sure.sum() < 66


def test_an_interval_over_seeds_stays_among_the_shares() -> None:
    rows = [
        {"status": "ok", "quant": "a", "seed": i, "value": v, "ci_low": v - 2, "ci_high": v + 0.5}
        for i, v in enumerate((60.0, 99.5))
    ]
    (cell,) = aggregate_seeds(pd.DataFrame(rows)).to_dict("records")
    assert (cell["ci_low"], cell["ci_high"], cell["n"]) == (0.0, 100.0, 2)


def test_each_float_network_is_a_reference_and_those_of_seeds_are_joined() -> None:
    def row(weights: str, seed: int, value: float) -> dict:
        ends = {"ci_low_float": value - 1, "ci_high_float": value + 1}
        return {
            "status": "ok",
            "model": "m",
            "weights": weights,
            "seed": seed,
            "value_float": value,
            "value": 1.0,
        } | ends

    rows = [
        row("a@1", 0, 90.0),
        row("a@1", 1, 90.0),
        row("b@2", 0, 80.0),
        row("trained 5 epochs", 0, 70.0),
        row("trained 5 epochs", 1, 72.0),
    ]
    found = float_references(pd.DataFrame(rows)).set_index("weights")
    assert found["mean"].to_dict() == {"a@1": 90.0, "b@2": 80.0, "trained 5 epochs": 71.0}
    assert found["n"].to_dict() == {"a@1": 1, "b@2": 1, "trained 5 epochs": 2}
    assert (found.loc["a@1", "ci_low"], found.loc["a@1", "ci_high"]) == (89.0, 91.0)
    assert found.loc["trained 5 epochs", "ci_high"] > 75, "two seeds say little"


def test_ranks_of_many_points_need_no_square_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    random = np.random.default_rng(3)
    value = random.normal(90, 3, 200).round(1)
    low, high = value - random.random(200), value + random.random(200)
    low[::17] = np.nan
    hits = [random.random(60) < score / 100 for score in value]
    by_intervals, paired = rank_ranges(value, low, high), rank_ranges(value, low, high, hits)
    monkeypatch.setattr(confidence, "PAIRED", 30)
    assert rank_ranges(value, low, high) == by_intervals
    few = rank_ranges(value, low, high, hits)
    best = np.argsort(-value, kind="stable")[:30]
    rest = [i for i in range(200) if i not in set(best)]
    assert [few[i] for i in rest] == [by_intervals[i] for i in rest]
    monkeypatch.setattr(confidence, "PAIRED", 200)
    assert rank_ranges(value, low, high, hits) == paired != few


def test_one_entry_against_all_others_is_its_row_of_the_whole() -> None:
    random = np.random.default_rng(4)
    value = random.normal(80, 8, 25)
    hits = [None if i % 6 == 0 else random.random(40 if i % 5 else 90) < score / 100 for i, score in enumerate(value)]
    whole = surely_better(value, value - 3, value + 3, hits)
    for i in range(25):
        assert (surely_better(value, value - 3, value + 3, hits, of=[i])[0] == whole[i]).all()
