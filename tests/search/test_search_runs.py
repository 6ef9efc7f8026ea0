"""Searches from the command line: the plan they write is the plan that ran, within its budget, and reads back."""

import json
from pathlib import Path

import pandas as pd
import pytest

SMALL = ["search.images=64", "search.widths=[2,4,8]"]


def folder(tmp_path: Path, metrics: dict) -> Path:
    return tmp_path / "runs" / metrics["study"] / metrics["point"]


def test_sensitivity_writes_its_table_and_changes_nothing(run, tmp_path):
    plain = run("quant=mse", "bits=w4a4")
    metrics = run("quant=mse", "bits=w4a4", "search=sensitivity", *SMALL)
    assert metrics["status"] == "ok" and metrics["value"] == plain["value"] and metrics["quant"] == "mse"
    table = pd.read_csv(folder(tmp_path, metrics) / "sensitivity.csv")
    assert set(table.bits) == {2, 4, 8} and (table.divergence >= 0).all()


def test_an_allocation_keeps_the_budget_and_its_plan_reads_back(run, tmp_path):
    plain = run("quant=mse", "bits=w3a3")
    found = run("quant=mse", "bits=w3a3", "search=allocate", "ends_bit=null", *SMALL)
    same = run("quant=mse", "bits=w3a3", "ends_bit=null")
    assert found["quant"] == "mse + allocate" and plain["quant"] == "mse"
    assert found["weight_bytes"] <= same["weight_bytes"] and found["bops"] <= same["bops"]
    layers = folder(tmp_path, found) / "layers.csv"
    assert set(pd.read_csv(layers).query("site == 'weight'").bits) <= {2, 4, 8}
    again = run("quant=mse", "bits=w3a3", "ends_bit=null", f"plan={layers}")
    assert (again["value"], again["weight_bytes"], again["bops"]) == (
        found["value"],
        found["weight_bytes"],
        found["bops"],
    )


def test_an_allocation_by_curvature_runs_and_trains(run):
    found = run(
        "quant=lsq",
        "schedule.epochs=1",
        "+trainer.limit_train_batches=2",
        "bits=w3a3",
        "search=allocate",
        "search.hessian=true",
        *SMALL,
    )
    assert found["status"] == "ok" and found["quant"] == "lsq + allocate by curvature"


def test_a_front_goes_on_where_it_was_cut_short(run, tmp_path, monkeypatch):
    from qexp.search import pareto

    options = ["quant=mse", "bits=w4a4", "search=pareto", "search.trials=14", "search.score_images=64", *SMALL]
    calls, score = [], pareto._compared

    def dies(*args):
        calls.append(1)
        if len(calls) == 6:
            raise KeyboardInterrupt
        return score(*args)

    monkeypatch.setattr(pareto, "_compared", dies)
    with pytest.raises(KeyboardInterrupt):
        run(*options)
    monkeypatch.setattr(pareto, "_compared", score)
    metrics = run(*options)
    assert metrics["status"] == "ok", metrics["error"]
    trials = pd.read_csv(folder(tmp_path, metrics) / "pareto.csv")
    assert len(trials) == 14 and trials.front.any()
    front = trials[trials.front]
    for row in front.itertuples():  # nothing beats a plan of the front in all three
        better = (trials.agree >= row.agree) & (trials.weight_bytes <= row.weight_bytes) & (trials.bops <= row.bops)
        strictly = (trials.agree > row.agree) | (trials.weight_bytes < row.weight_bytes) | (trials.bops < row.bops)
        assert not (better & strictly).any()
    plans = sorted((folder(tmp_path, metrics) / "front").iterdir())
    assert len(plans) == metrics["search_front"]
    assert run("quant=mse", f"plan={plans[0] / 'layers.csv'}")["status"] == "ok"


@pytest.mark.parametrize(
    ("option", "says"),
    [
        ("search.layers=nosuch*", "is left to choose"),
        ("search.sites=[output]", "use weight, input"),
        ("search.images=0", "use 1 or more"),
        ("search.budget.weight_bytes=1", "already cost"),
    ],
)
def test_what_cannot_be_searched_is_said(run, option, says):
    metrics = run("quant=mse", "search=allocate", *SMALL, option)
    assert metrics["status"] == "failed" and says in metrics["error"]


def test_test_images_never_enter(run, tmp_path):
    """The table does not depend on the test images."""
    one = run("quant=mse", "search=sensitivity", *SMALL, "max_samples=10", "study=a")
    other = run("quant=mse", "search=sensitivity", *SMALL, "max_samples=50", "study=b")
    tables = [(folder(tmp_path, m) / "sensitivity.csv").read_text() for m in (one, other)]
    assert tables[0] == tables[1] and json.dumps(one) != json.dumps(other)
