"""A point on several processes is the point on one: the same statistics, ranges, hits and accuracy; a training whose ranks agree."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from qexp.calibration.cache import load_stats
from qexp.calibration.calibrate import calibrate, collect
from qexp.errors import QexpError
from qexp.layers import swap
from qexp.quantizers.uniform import Uniform
from qexp.run import devices
from qexp.run.settings import read
from qexp.system import ranks
from tests.networks import Residual

ROOT = Path(__file__).parents[2]
TWO = ("trainer=ddp", "trainer.accelerator=cpu", "trainer.enable_progress_bar=false")


@pytest.fixture(scope="module", autouse=True)
def nobody_left():
    yield
    ranks.dismiss()


def numbers(count: int) -> tuple[int, int, list[int], list[int]]:
    part = ranks.share(range(count))
    mine = torch.arange(count)[None, ranks.rank() :: ranks.world()]
    joined = [item for some in ranks.gathered(list(part)) for item in some]
    return ranks.rank(), ranks.world(), joined, ranks.interleaved(mine)[0].tolist()


def fails_on_one(_: int) -> None:
    if ranks.rank() == 1:
        raise QexpError("rank 1 has had enough")
    ranks.gathered(0)


BARS = """
from qexp.system import ranks
from qexp.run.settings import read

def bar(n):
    from tqdm import tqdm
    return sum(tqdm(range(n)))

if __name__ == "__main__":
    print("sum", ranks.spread(bar, 2, 4))
"""


def test_processes_with_progress_bars_leave_nothing_behind(tmp_path):
    (tmp_path / "bars.py").write_text(BARS)
    words, paths = [sys.executable, "bars.py"], {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(words, cwd=tmp_path, env=os.environ | paths, capture_output=True, text=True, timeout=300)
    assert "sum 6" in done.stdout and "leaked" not in done.stderr, done.stderr


def test_alone_there_is_one_rank():
    assert numbers(5) == (0, 1, list(range(5)), list(range(5)))


@pytest.mark.parametrize(("asked", "nodes"), [(0, 1), (-1, 1), ([0, 1], 1), ("many", 1), (1, 2)])
def test_what_cannot_be_had_is_refused(compose, asked, nodes):
    with pytest.raises(QexpError, match="trainer"):
        devices.processes(
            read(compose("trainer=cpu", f"trainer.devices={asked}", f"+trainer.num_nodes={nodes}")).trainer
        )


def test_calibration_runs_where_it_is_told(residual):
    """On a device that holds no values it can only fail: so it is there that the model has run, and it comes home."""
    batch = [torch.randn(2, 3, 8, 8)]
    with pytest.raises((NotImplementedError, RuntimeError)):
        collect(residual, batch, progress=False, device=torch.device("meta"))
    assert not {h for m in residual.modules() for h in m._forward_hooks}
    seen = collect(Residual().eval(), batch, progress=False, device=torch.device("cpu"))
    assert all(site.tensor.count.device.type == "cpu" for site in seen.stats.values())


@pytest.mark.slow
def test_parts_join_and_samples_find_their_places():
    assert ranks.spread(numbers, 2, 7) == (0, 2, list(range(7)), list(range(7)))


@pytest.mark.slow
def test_an_error_of_any_rank_ends_all_and_is_raised():
    with pytest.raises(QexpError, match="enough"):
        ranks.spread(fails_on_one, 2, 0)
    assert ranks.spread(numbers, 2, 3)[1] == 2, "the next call has new processes"


def quantized(rule) -> nn.Module:
    torch.manual_seed(0)
    model = Residual().eval()
    for name in ("stem", "depthwise", "conv"):
        layer = model.get_submodule(name)
        swap(layer, {"input": Uniform(4, (1, layer.in_channels, 8, 8), symmetric=False, range=rule)})
    return model


@pytest.mark.slow
@pytest.mark.parametrize("batches", [5, 1])
def test_two_processes_see_what_one_sees(tmp_path, batches):
    """Counts, extremes, batch by batch, and histograms alike; sums to the last bits of float64; every range the same."""
    from qexp.ranges import MSE, MovingAverage

    images = [torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(i)) * (1 + i) for i in range(batches)]
    for rule in (MSE(), MovingAverage()):
        one, two = quantized(rule), quantized(rule)
        calibrate(one, images, cache_dir=tmp_path / "one", progress=False)
        calibrate(two, images, cache_dir=tmp_path / "two", progress=False, processes=2)
        for name in ("stem", "depthwise", "conv"):
            a, b = (m.get_submodule(name).input_quantizer for m in (one, two))
            assert torch.equal(a.scale, b.scale) and torch.equal(a.zero_point, b.zero_point)
    kept = [load_stats(next((tmp_path / side).glob("*"))) for side in ("one", "two")]
    assert list(kept[0]) == list(kept[1]) and kept[0].aliases == kept[1].aliases
    for key in kept[0].stats:
        a, b = (k.stats[key].tensor for k in kept)
        assert torch.equal(a.histogram.counts, b.histogram.counts) and torch.equal(a.histogram.low, b.histogram.low)
        for name in ("count", "zeros", "batch_min", "batch_max", "sample_min", "sample_max"):
            assert torch.equal(getattr(a, name), getattr(b, name)), name
        for name in ("total", "squares", "deviation"):
            assert torch.allclose(getattr(a, name), getattr(b, name), rtol=1e-12, atol=0), name


@pytest.mark.slow
def test_a_point_on_two_processes_is_the_point_on_one(run, tmp_path):
    options = ("quant=mse", "bits=w4a4", "max_samples=203", "dataset.data.eval_batch_size=50")
    one = run(*options, "study=one", f"runs_dir={tmp_path / 'one'}")
    two = run(*options, "study=two", f"runs_dir={tmp_path / 'two'}", *TWO)
    assert two["status"] == "ok", two["error"]
    assert one["point"] == two["point"] and one["n_eval"] == two["n_eval"] == 203
    for name in ("value", "value_float", "top5", "ci_low", "worst_sqnr"):
        assert one[name] == two[name], name
    a, b = (tmp_path / side / side / one["point"] for side in ("one", "two"))
    assert np.array_equal(np.load(a / "correct.npy"), np.load(b / "correct.npy")), "in the order of the test images"
    pd.testing.assert_frame_equal(pd.read_csv(a / "layers.csv"), pd.read_csv(b / "layers.csv"))


def last(folder: Path) -> dict:
    return torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)


@pytest.mark.slow
@pytest.mark.parametrize("quant", ["lsq", "pact", "hysteresis"])
def test_two_processes_train_as_one_with_their_batches_together(run, tmp_path, quant, digits_weights):
    """Half the batch each, no augmentation, batch norm frozen: gradients averaged over the ranks are those of the whole batch."""
    options = (f"quant={quant}", "schedule=qat", "schedule.epochs=1", "trainer.limit_train_batches=4", "bn=freeze")
    bits = ("layer_wbit=1", "layer_abit=4") if quant == "hysteresis" else ("bits=w4a4",)
    one = run(*options, *bits, f"runs_dir={tmp_path / 'one'}", "study=s", "dataset.data.batch_size=64")
    two = run(*options, *bits, f"runs_dir={tmp_path / 'two'}", "study=s", "dataset.data.batch_size=32", *TWO)
    assert one["status"] == two["status"] == "ok", (one["error"], two["error"])
    a, b = (last(tmp_path / side / "s" / m["point"]) for side, m in (("one", one), ("two", two)))
    assert a["global_step"] == b["global_step"] == 4 and a["state_dict"].keys() == b["state_dict"].keys()
    for key, start in load_file(digits_weights).items():
        x, y = (side["state_dict"][f"model.{key}"] for side in (a, b))
        if start.is_floating_point() and "running" not in key:
            assert (x - y).norm() < 0.1 * (x - start).norm(), key  # a code that flips at a tie is amplified
    assert abs(one["value"] - two["value"]) <= 2
    assert (tmp_path / "two" / "s" / two["point"] / "curves.csv").exists()
