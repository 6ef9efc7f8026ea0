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


class OneReLU(nn.Module):
    """One ReLU and one pool at places of 4 and of 6 channels, as every tutorial writes them."""

    def __init__(self, num_classes: int, width: int) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(1, width, 3), nn.Conv2d(width, 6, 3)
        self.fc = nn.Linear(6, num_classes)
        self.relu, self.pool = nn.ReLU(), nn.MaxPool2d(2)

    def forward(self, x):
        x = self.pool(self.relu(self.conv1(x)))
        return self.fc(self.relu(self.conv2(x)).flatten(1))


def test_a_run_of_one_module_at_places_of_different_widths_ends_with_its_table(compose, tmp_path):
    import pandas as pd

    from qexp.run.pipeline import run
    from qexp.run.settings import read

    options = ["trainer=cpu", "trainer.enable_progress_bar=false", "kernels=reference", f"runs_dir={tmp_path}"]
    net = ["model.net._target_=tests.calibration.test_summary.OneReLU", "model.groups=[]", "model.net.width=4"]
    fast = ["schedule.pretrain.epochs=1", "max_samples=100", "n_calibrate=32", "quant=minmax"]
    metrics = run(read(compose(*options, *net, *fast)))
    assert metrics["status"] == "ok", metrics
    (path,) = tmp_path.glob("*/*/statistics.csv")
    table = pd.read_csv(path).set_index(["layer", "site"])
    shared = table.loc[("relu", slice(None)), :]
    assert len(shared) and shared["channels"].isna().all() and shared["count"].gt(0).all()
    assert table.loc[("fc", "input"), "channels"] == 6
