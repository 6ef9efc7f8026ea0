"""The benchmarks run on every implementation and report ratios."""

import pytest
import torch
from qexp_kernels import bench, timing


def test_a_figure_is_the_ratio_of_medians():
    def busy(n):
        return lambda: sum(range(n))

    found = timing.figure(timing.Measure("a", busy(400_000), "b", busy(100_000), 5), torch.device("cpu"), 5)
    assert found.ratio == pytest.approx(found.milliseconds / found.baseline_milliseconds)
    assert 1.5 < found.ratio < 12 and found.goal == 5


def test_the_table_names_goals():
    row = timing.Figure("copy", "clone", 2.0, 1.0, 2.0, 1.25)
    assert bench.table([row]).splitlines()[-1] == "| copy | 2.00 | clone | 1.00 | 2 | <= 1.25 |"


@pytest.mark.slow
def test_every_benchmark_runs(implementation):
    found = bench.figures(torch.device("cpu"), rounds=1)
    assert {f.goal for f in found} >= {1.25, 1.5, 3, 1 / 20} and all(f.milliseconds > 0 for f in found)
