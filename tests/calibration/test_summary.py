"""The table of what calibration saw equals what numpy finds of the same tensors."""

import numpy as np
import pytest
import torch
from torch import nn

from qexp.calibration.calibrate import collect
from qexp.calibration.summary import summary
from qexp.network.facts import facts
from qexp.recipe import Recipe, apply, resolve


def test_the_table_holds_what_numpy_finds():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 3)).eval()
    images = torch.randn(16, 3, 8, 8)
    structure = facts(net, images)
    sites = {"input": {"_target_": "qexp.quantizers.uniform.Uniform"}}
    apply(net, resolve(net, structure, Recipe(sites)), structure)
    table = summary(collect(net, [images[:10], images[10:]], progress=False)).set_index(["layer", "site"])
    x = net[1](nn.Conv2d.forward(net[0], images)).detach().double().numpy()
    by_channel = x.transpose(1, 0, 2, 3).reshape(4, -1)
    row = table.loc["2", "input"]
    assert row["count"] == x.size and row["channels"] == 4
    b = [np.abs(c - c.mean()).mean() for c in by_channel]
    centred = x.ravel() - x.mean()
    kurtosis = (centred**4).mean() / (centred**2).mean() ** 2 - 3
    found = {"min": x.min(), "max": x.max(), "mean": x.mean(), "std": x.ravel().std(ddof=1), "kurtosis": kurtosis}
    for measure, value in found.items():
        assert row[measure] == pytest.approx(value, rel=1e-4, abs=1e-6), measure
    assert row["b_channels_max"] == pytest.approx(max(b), rel=2e-2)
    stds = by_channel.std(1, ddof=1)
    ends = [row[f"std_channels_{end}"] for end in ("min", "mean", "max")]
    assert ends == pytest.approx([stds.min(), stds.mean(), stds.max()], rel=1e-4)


def test_a_run_leaves_the_table(run, tmp_path):
    import pandas as pd

    metrics = run("quant=minmax", "study=s")
    table = pd.read_csv(tmp_path / "runs" / "s" / metrics["point"] / "statistics.csv")
    assert len(table) > 3 and {"mean", "std", "b", "kurtosis", "mean_abs"} <= set(table.columns)
