"""A searched plan against the uniform one of its cost: what each gained, and what the search took."""

import json
from pathlib import Path

import numpy as np
import pandas as pd

from experiments.search.collect import against_uniform, named, price, report


def write(study: Path, name: str, quant: str, right: int, **more: object) -> None:
    """Writes a point that got the first so many of 100 images right."""
    folder = study / name
    folder.mkdir(parents=True)
    row = {
        "status": "ok", "model": "net", "dataset": "images", "quant": quant, "layer_wbit": 4, "layer_abit": 6, "metric": "top1",
        "value": right, "value_float": 90.0, "ci_low": right - 2, "ci_high": right + 2, "n_eval": 100, "seconds_evaluate": 5.0,
        "weight_bytes": 1000, "bops": 2000,
    }  # fmt: skip
    (folder / "metrics.json").write_text(json.dumps(row | more))
    np.save(folder / "correct.npy", np.arange(100) < right)


def test_gain_cost_and_price(tmp_path: Path) -> None:
    study = tmp_path / "search"
    write(study, "a", "mse", 60)
    write(study, "b", "mse + allocate", 80, weight_bytes=990, seconds_sensitivity=3.0, search_images=32)
    write(study, "c", "mse + pareto", 60, seconds_sensitivity=0.1, search_images=32)
    cases = [{"layer": layer, "site": "weight", "bits": b, "divergence": 1.0} for layer in "xy" for b in (2, 4, 8)]
    pd.DataFrame(cases).to_csv(study / "b" / "sensitivity.csv", index=False)
    points = named(study)
    assert list(points.quant) == ["mse", "mse + pareto", "mse + allocate"]
    lines = against_uniform(points, study)
    assert lines[2] == "| W4A6 | mse + pareto | 100.0 % | 100.0 % | +0.00 ± 0.00 | 0 / 0 | 1 |"
    assert lines[3] == "| W4A6 | mse + allocate | 99.0 % | 100.0 % | +20.00 ± 7.84 | 20 / 0 | < 0.0001 |"
    said = price(points, study)
    assert "2 tensors x 3 widths = 6 cases on 32 images in 3 s" in said and "would take 30 s, **10 times**" in said
    assert "| mse + allocate | 80.00 ± 2.00 |" in report(study)
