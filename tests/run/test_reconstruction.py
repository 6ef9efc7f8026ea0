"""Learned roundings in a whole run: recipes, the record, what is kept, and a run that was killed."""

import json

import pytest
import torch

from qexp.passes.reconstruction import reconstruct

QUICK = ("quant.passes.reconstruct.iterations=40", "quant.passes.reconstruct.batch=16")


@pytest.mark.parametrize("quant", ["adaround", "brecq", "qdrop"])
def test_the_recipe_runs_and_the_record_says_what_was_learned(run, tmp_path, quant):
    steps = ("quant.passes.reconstruct.step_iterations=20",) if quant == "brecq" else ()
    metrics = run(f"quant={quant}", "bits=w3a8", "study=s", *QUICK, *steps)
    assert metrics["status"] == "ok", metrics["error"]
    assert metrics["reconstructed_units"] > 2 and 0 < metrics["roundings_moved"] < 50
    folder = tmp_path / "runs" / "s" / metrics["point"]
    kept = list((folder / "checkpoints" / "reconstruction").glob("*.pt"))
    assert len(kept) == metrics["reconstructed_units"] * (2 if quant == "brecq" else 1)
    assert json.loads((folder / "metrics.json").read_text())["peak_mb"] > 0
    nearest = run("quant=mse", "bits=w3a8", "study=s")
    assert metrics["value"] >= nearest["value"] - 2


@pytest.mark.slow
def test_a_killed_run_goes_on_and_force_starts_over(run, tmp_path, monkeypatch):
    whole = run("quant=adaround", "bits=w2a8", "study=whole", *QUICK)
    real, learned = reconstruct.learn, []

    def dies(*args):
        if len(learned) == 2:
            raise KeyboardInterrupt
        learned.append(args[0].name)
        return real(*args)

    monkeypatch.setattr(reconstruct, "learn", dies)
    with pytest.raises(KeyboardInterrupt):
        run("quant=adaround", "bits=w2a8", "study=killed", *QUICK)
    again: list[str] = []
    monkeypatch.setattr(reconstruct, "learn", lambda *args: again.append(args[0].name) or real(*args))
    resumed = run("quant=adaround", "bits=w2a8", "study=killed", *QUICK)
    assert again and not set(again) & set(learned)
    assert resumed["value"] == whole["value"] and resumed["roundings_moved"] == whole["roundings_moved"]
    files = [
        sorted((tmp_path / "runs" / study / point["point"]).rglob("0-*.pt"))
        for study, point in (("whole", whole), ("killed", resumed))
    ]
    for one, other in zip(*files, strict=True):
        a, b = (torch.load(path, weights_only=True)["state"] for path in (one, other))
        assert all(torch.equal(a[site][k], v) for site in b for k, v in b[site].items())
    again.clear()
    run("quant=adaround", "bits=w2a8", "study=killed", "force=true", *QUICK)
    assert set(again) >= set(learned)


def test_too_few_images_fail_the_point_with_what_to_do(run):
    metrics = run("quant=adaround", "n_calibrate=16", "study=s")
    assert metrics["status"] == "failed"
    assert "16 calibration images do not fill a batch of 32" in metrics["error"] and "n_calibrate" in metrics["error"]
