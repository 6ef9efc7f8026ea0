"""The study of the optimal clip: its tables are those of the code, analysis meets simulation, the page opens by itself."""

from pathlib import Path

import pytest

from experiments.optimal_clip.page import page
from experiments.optimal_clip.study import allocation, curve, optima, samples, tables

README = Path(__file__).parents[2] / "experiments" / "optimal_clip" / "README.md"


def test_the_readme_holds_the_generated_tables():
    text = README.read_text()
    for table in tables().split("\n\n"):
        assert table in text, "run python -m experiments.optimal_clip.page and put its tables into the README"


@pytest.mark.parametrize("prior", ["gauss", "laplace"])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_the_closed_form_meets_the_simulation(prior, bits):
    found = curve(prior, bits, samples(prior), points=5)
    assert found["simulated"] == pytest.approx(found["exact"], rel=0.06)
    assert all(m < e for m, e in zip(found["model"], found["exact"]) if bits < 8), "the model has one level more"


def test_the_analytic_clip_is_wide_at_few_bits_and_costs_little():
    rows = {row["bits"]: row for row in optima()}
    assert 8 < rows[2]["gauss wider"] < 13 and 8 < rows[2]["laplace wider"] < 13
    assert rows[4]["gauss wider"] < 2 and rows[4]["laplace wider"] < 2
    assert all(0 <= row[f"{prior} cost"] < 2 for row in rows.values() for prior in ("gauss", "laplace"))


def test_bits_by_channel_never_cost_and_save_where_channels_differ():
    rows = allocation([0.0, 0.5, 1.0])
    assert all(3.99 <= row["mean"] <= 4 for row in rows), "the budget is met, never exceeded"
    ratios = [row["allocated"] / row["equal"] for row in rows]
    assert ratios[0] == 1 and ratios[0] > ratios[1] > ratios[2]


@pytest.mark.slow
def test_the_page_is_one_file():
    text = page()
    assert "<script src=" not in text and 'rel="stylesheet"' not in text and "allocation" in text
