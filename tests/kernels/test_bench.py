"""The benchmarks run on every implementation and report ratios."""

import pytest
import torch
from qexp_kernels import bench, timing


def test_a_figure_is_the_ratio_of_medians(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(timing.time, "perf_counter", lambda: clock[0])

    def takes(*seconds):
        rounds = iter(seconds)

        def run():
            clock[0] += next(rounds)

        return run

    slow, fast = takes(9, 9, 4, 30, 4, 5, 4), takes(9, 9, 1, 2, 2, 2, 50)  # two rounds to warm up, then five
    found = timing.figure(timing.Measure("a", slow, "b", fast, 5), torch.device("cpu"), 5)
    assert (found.milliseconds, found.baseline_milliseconds) == (4000, 2000)
    assert (found.ratio, found.goal) == (2, 5)


def test_the_table_names_goals():
    row = timing.Figure("copy", "clone", 2.0, 1.0, 2.0, 1.25)
    assert bench.table([row]).splitlines()[-1] == "| copy | 2.00 | clone | 1.00 | 2 | <= 1.25 |"


@pytest.mark.slow
def test_every_benchmark_runs(implementation):
    found = bench.figures(torch.device("cpu"), rounds=1)
    assert {f.goal for f in found} >= {1.25, 1.5, 3, 1 / 20} and all(f.milliseconds > 0 for f in found)
