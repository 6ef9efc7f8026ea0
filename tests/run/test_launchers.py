"""The same sweep through every launcher, for real: the same rows, one table and page, and an exit status that reports failures."""

from __future__ import annotations

import importlib.util
import os
import secrets
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pandas as pd
import pytest

from qexp.run.settings import read

ROOT = Path(__file__).parents[2]
DATA = ("qexp.data.digits.Digits", "qexp.data.digits.Nothing")  # there is no such class: two of the four points fail
SWEEP = ("layer_wbit=4,8", "layer_abit=3", f"dataset.data._target_={','.join(DATA)}")
SAME = ["layer_wbit", "layer_abit", "status", "error", "value", "value_float", "bops", "mean_wbit"]
LAUNCHERS = {
    "basic": (),
    "joblib": ("hydra/launcher=joblib", "hydra.launcher.n_jobs=2"),
    "submitit_local": ("hydra/launcher=submitit_local", "hydra.launcher.timeout_min=5"),
    "ray": (
        "hydra/launcher=ray",
        "+hydra.launcher.ray.init.num_cpus=2",
        "+hydra.launcher.ray.init.include_dashboard=false",
    ),
}
PLUGINS = {name: f"hydra_plugins.hydra_{name.split('_')[0]}_launcher" for name in LAUNCHERS if name != "basic"}
FAIR = {"RAY_worker_niceness": "0"}  # 15 if unsaid, and then workers starve beside other tests
# A cluster of another test may run meanwhile, which Ray would join of itself
OWN = {"ray": {"RAY_ADDRESS": "local"} | FAIR}
RAY = {
    "RAY_AUTH_MODE": "token",
    "RAY_AUTH_TOKEN": secrets.token_hex(16),
} | FAIR  # head and driver know each other by the token

pytestmark = pytest.mark.slow


def sweep(runs: Path, digits: list[str], *overrides: str, **variables: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "run.py", "-m", *digits, *SWEEP, f"runs_dir={runs}", "study=s", *overrides],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)} | variables,
        capture_output=True,
        text=True,
        timeout=400,
    )


def rows(runs: Path) -> pd.DataFrame:
    return pd.read_csv(runs / "s" / "results.csv")[SAME].sort_values(["layer_wbit", "status"]).reset_index(drop=True)


@pytest.fixture(scope="session")
def expected(tmp_path_factory, digits_weights, compose) -> pd.DataFrame:
    """The rows of the sweep, point by point in this process."""
    from qexp.results.table_csv import write_results
    from qexp.run import pipeline

    runs = tmp_path_factory.mktemp("runs")
    for point in (
        [f"layer_wbit={w}", "layer_abit=3", f"dataset.data._target_={data}"] for w in (4, 8) for data in DATA
    ):
        pipeline.run(read(compose(*options(digits_weights), f"runs_dir={runs}", "study=s", *point)))
    write_results(runs / "s")
    return rows(runs)


def options(weights: Path) -> list[str]:
    return [
        f"weights={weights}",
        "model.net.width=8",
        "trainer=cpu",
        "trainer.enable_progress_bar=false",
        "kernels=reference",
        "max_samples=200",
        "n_calibrate=64",
    ]


def check(done: subprocess.CompletedProcess, runs: Path, expected: pd.DataFrame) -> None:
    said = done.stdout + done.stderr
    assert done.returncode == 1, said
    assert "2 points failed" in said, said
    pd.testing.assert_frame_equal(rows(runs), expected)
    lines = [line for line in done.stdout.splitlines() if line.startswith("point ")]
    assert [line.split(",")[0] for line in lines] == [f"point {i} of 4" for i in (1, 2, 3, 4)], done.stdout
    assert all("about" in line for line in lines[:3]) and done.stdout.index(lines[3]) < done.stdout.index(
        "95 % interval"
    )
    if "hydra/launcher=" in str(done.args):  # results of other processes are printed here
        assert sum("ptq W8A3: top-1 " in line for line in lines) == 1, lines
        assert sum(line.endswith(": failed") for line in lines) == 2, lines
    assert (runs / "s" / "dashboard.html").stat().st_size > 10_000 and "W8A3" in done.stdout
    for point in (runs / "s").glob("*/metrics.json"):
        assert (point.parent / "log.txt").stat().st_size > 0


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_every_launcher_gives_the_same_table(launcher, digits, tmp_path, expected):
    if launcher in PLUGINS and importlib.util.find_spec(PLUGINS[launcher]) is None:
        pytest.skip(f"{PLUGINS[launcher]} is not installed (the extra `sweep`)")
    done = sweep(tmp_path, digits, *LAUNCHERS[launcher], **OWN.get(launcher, {}))
    check(done, tmp_path, expected)


@pytest.fixture
def ray_cluster(tmp_path) -> Iterator[str]:
    """The address of a Ray cluster of one node that runs beside the tests."""
    pytest.importorskip("hydra_plugins.hydra_ray_launcher")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    start = [
        str(Path(sys.executable).parent / "ray"),
        "start",
        "--head",
        "--block",
        "--num-cpus=2",
        "--disable-usage-stats",
    ]
    head = subprocess.Popen(
        [*start, f"--port={address.split(':')[1]}", "--include-dashboard=false"],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)} | RAY,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    for line in head.stdout:
        if "Ray runtime started" in line:
            break
    yield address
    head.terminate()
    head.communicate(timeout=60)


def test_an_existing_ray_cluster_takes_the_points(digits, tmp_path, ray_cluster, expected):
    where = f"hydra.launcher.ray.init.address={ray_cluster}"
    done = sweep(
        tmp_path, digits, "hydra/launcher=ray", where, "+hydra.launcher.ray.init.object_store_memory=null", **RAY
    )
    check(done, tmp_path, expected)


def test_a_finished_sweep_started_again_elsewhere_ends_with_its_table(digits, tmp_path):
    """Receipts, not new files, name the study a sweep wrote to: nothing is run, the table is there all the same."""
    pytest.importorskip("hydra_plugins.hydra_joblib_launcher")
    for _ in range(2):
        one = ("layer_wbit=8", "layer_abit=8,4", f"dataset.data._target_={DATA[0]}")
        done = sweep(tmp_path, digits, *one, *LAUNCHERS["joblib"])
        assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("finished earlier") == 2 and "W8A4" in done.stdout and "results.csv" in done.stdout


def test_slurm_is_configured():
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher")
    asked = (
        "hydra/launcher=submitit_slurm",
        "hydra.launcher.partition=gpu",
        "hydra.launcher.gpus_per_node=1",
        "trainer=gpu",
    )
    done = subprocess.run(
        [sys.executable, "run.py", *asked, "--cfg", "hydra"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode == 0, done.stderr
    assert "partition: gpu" in done.stdout and "SlurmLauncher" in done.stdout
