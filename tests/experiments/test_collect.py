"""A study's table: rows named by the settings in which they differ, cells with intervals, and what they cost."""

import pandas as pd
from omegaconf import OmegaConf

from experiments.collect import label, methods, price, rows, table


def study(tmp_path, points):
    """Writes the configurations of points (quant, passes, wbit, settings of passes, value) and returns their table."""
    made = []
    for i, (quant, passes, wbit, settings, value) in enumerate(points):
        (tmp_path / str(i)).mkdir()
        OmegaConf.save(
            OmegaConf.create(
                {"quant": {"name": quant}, "passes": settings, "layer_wbit": wbit, "layer_abit": 8, "seed": 0}
            ),
            tmp_path / str(i) / "config.yaml",
        )
        made.append(
            {"point": str(i), "quant": quant, "passes": passes, "bits": f"W{wbit}A8", "status": "ok", "value": value}
            | {
                "ci_low": value - 1,
                "ci_high": value + 1,
                "value_float": 92.0,
                "seconds_calibrate": 70,
                "seconds_train": 20,
                "mean_wbit": wbit,
                "mean_abit": 8,
                "peak_mb": 1000.4,
            }
        )
    frame = pd.DataFrame(made)
    frame["folder"] = [tmp_path / point for point in frame.point]
    frame["method"] = methods(frame)
    return frame


def test_rows_are_named_by_passes_and_settings_only_where_there_are_several(tmp_path):
    correct = {"bias": {"mode": "mean", "images": 128}}
    frame = study(
        tmp_path,
        [
            ("adaround", "reconstruct", 4, {}, 91.0),
            ("mse", "", 4, {}, 90.0),
            ("mse", "bias", 4, correct, 90.5),
            ("mse", "bias", 4, {"bias": {"mode": "output", "images": 128}}, 90.7),
            ("mse", "bias", 2, correct, 80.0),
        ],
    )
    assert frame.method.tolist() == [
        "adaround",
        "mse",
        "mse + bias (mode=mean)",
        "mse + bias (mode=output)",
        "mse + bias (mode=mean)",
    ]
    lines = table(frame).splitlines()
    assert lines[0] == "| method | W4A8 | W2A8 |" and lines[-1] == "float 92.00"
    assert "| mse + bias (mode=mean) | 90.50 ± 1.00 | 80.00 ± 1.00 |" in lines
    assert "| adaround | 91.00 ± 1.00 |  |" in lines
    assert "| adaround | 1.5 min, 1000 MiB |  |" in rows(frame, price)


def test_runs_with_a_plan_stand_under_their_mean_bits(tmp_path):
    frame = study(tmp_path, [("mse", "", 8, {}, 91.0), ("mse", "", 8, {}, 90.0), ("mse", "", 8, {}, 89.0)])
    for i in (1, 2):
        config = OmegaConf.load(tmp_path / str(i) / "config.yaml")
        config.plan = f"plans/{i}.csv"
        OmegaConf.save(config, tmp_path / str(i) / "config.yaml")
    frame["layer_wbit"] = frame["layer_abit"] = pd.Series([8, "plan", "plan"], dtype=object)
    frame["mean_wbit"] = [8, 4.25, 4.25]
    frame["bits"] = [label(row) for row in frame.to_dict("records")]
    assert frame.bits.tolist() == ["W8A8", "W~4.2A~8", "W~4.2A~8"]
    assert methods(frame) == ["mse", "mse (plan=plans/1.csv)", "mse (plan=plans/2.csv)"]
