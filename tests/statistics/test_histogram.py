"""Counts in bins of powers of two: nothing is lost, order does not matter."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qexp.statistics.histogram import Histogram
from qexp.statistics.stats import TensorStats
from tests.strategies import KINDS, values


def filled(*parts: torch.Tensor, bins: int = 64) -> Histogram:
    hist = Histogram(len(parts[0]), bins)
    for x in parts:
        hist.update(x, x.amin(1), x.amax(1))
    return hist


def check_counts(hist: Histogram, rows: torch.Tensor) -> None:
    """Compares each row with numpy's count of its non-zero values between the same edges."""
    for g, row in enumerate(rows.double().numpy()):
        edges = hist.edges(g).numpy()
        nonzero = row[row != 0]
        expected = [((nonzero >= a) & (nonzero < b)).sum() for a, b in pairwise(edges)]
        assert hist.counts[g].tolist() == expected
        assert hist.counts[g].sum() == len(nonzero)


@settings(max_examples=30, deadline=None)
@given(kinds=st.lists(st.sampled_from(KINDS), min_size=1, max_size=4), data=st.data())
def test_counts_are_exact_in_any_order(kinds, data):
    parts = [values(kind, (2, 40), i) for i, kind in enumerate(kinds)]
    check_counts(filled(*parts), torch.cat(parts, 1))
    check_counts(filled(*data.draw(st.permutations(parts))), torch.cat(parts, 1))


@settings(max_examples=30, deadline=None)
@given(kinds=st.lists(st.sampled_from(KINDS), min_size=2, max_size=4), data=st.data())
def test_merging_is_exact_in_any_order(kinds, data):
    parts = [values(kind, (2, 40), i) * 3**i for i, kind in enumerate(kinds)]
    merged = Histogram(2, 64)
    for x in data.draw(st.permutations(parts)):
        merged.merge(filled(x))
    check_counts(merged, torch.cat(parts, 1))
    merged.merge(Histogram(2, 64))
    check_counts(merged, torch.cat(parts, 1))


@pytest.mark.parametrize("kind", KINDS)
def test_counts_of_one_kind_are_exact(kind):
    check_counts(filled(values(kind, (2, 40), 0)), values(kind, (2, 40), 0))


def test_half_of_the_bins_span_what_was_seen():
    for scale in (1e-20, 1e-3, 1.0, 7.3, 1e20):
        hist = filled(values("normal", (3, 1000), 0) * scale, bins=128)
        used = hist.counts > 0
        spans = [int(row.nonzero().max() - row.nonzero().min()) for row in used]
        assert min(spans) >= 128 // 2 - 2


def test_growing_by_orders_of_magnitude_keeps_every_count():
    parts = [torch.full((1, 10), 10.0**e) for e in (-30, -10, 0, 5, 30)]
    check_counts(filled(*parts), torch.cat(parts, 1))


def test_state_round_trip():
    hist = filled(values("normal", (3, 100), 0))
    back = Histogram.from_state(hist.state())
    assert torch.equal(back.counts, hist.counts) and torch.equal(back.edges(1), hist.edges(1))


@pytest.mark.parametrize("kind", ["normal", "laplace", "relu", "positive", "spike", "ties", "negative"])
def test_order_statistics_are_right_to_half_a_bin(kind):
    x = values(kind, (1, 20_000), 3)
    stats = TensorStats()
    stats.update(x)
    ordered, width = np.sort(x.double().numpy().ravel()), float(stats.histogram.width[0])
    for rank in (0, 1, 20, 5_000, 10_000, 19_980, 19_999):
        found = stats.density.order(torch.tensor([float(rank)], dtype=torch.float64)).item()
        assert abs(found - ordered[rank]) <= width / 2 + 1e-12
    magnitude = np.sort(np.abs(ordered))[::-1]
    for rank in (0, 1, 20, 5_000):
        found = stats.density.absolute_order(torch.tensor([float(rank)], dtype=torch.float64)).item()
        assert abs(found - magnitude[rank]) <= width / 2 + 1e-12
