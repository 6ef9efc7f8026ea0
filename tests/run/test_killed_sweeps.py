"""What a sweep survives: killed at any moment, a full disk, damaged records, another sweep into the same study."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from qexp.results.table_csv import collect, write_results
from qexp.run import pipeline

ROOT = Path(__file__).parents[2]
VOLATILE = ["seconds_calibrate", "seconds_train", "seconds_evaluate", "peak_mb", "study", "commit"]
SWEEP = ["layer_wbit=3,8", "layer_abit=2,8", "quant=mse"]
POINTS = [f"layer_wbit={w} layer_abit={a} quant=mse".split() for w in (3, 8) for a in (2, 8)]


def table(study: Path) -> pd.DataFrame:
    """Returns what `results.csv` holds, without what differs from run to run."""
    write_results(study)
    frame = pd.read_csv(study / "results.csv")
    return frame.drop(columns=[c for c in frame if c in VOLATILE])


def command(digits: list[str], runs: Path, *overrides: str) -> list[str]:
    return [sys.executable, "run.py", "-m", *digits, f"runs_dir={runs}", *SWEEP, *overrides]


def environment() -> dict[str, str]:
    return os.environ | {"OMP_NUM_THREADS": "1"}


@pytest.fixture
def undisturbed(run, tmp_path) -> pd.DataFrame:
    for point in POINTS:
        assert run("study=undisturbed", *point)["status"] == "ok"
    return table(tmp_path / "runs" / "undisturbed")


KILLED = """
import os, random, shutil, signal, sys, time
from hydra import compose, initialize_config_dir
from qexp.run import pipeline
from qexp.run.settings import read
from qexp.command.root import register
from qexp.report.study import finish
from pathlib import Path

register()
root, runs, kills, *overrides = sys.argv[1:]
points = [line.split() for line in sys.stdin.read().splitlines()]
with initialize_config_dir(root + "/conf", version_base="1.3"):
    cfgs = [compose("config", [*overrides, "runs_dir=" + runs, "study=s", *point]) for point in points]

def sweep():
    for cfg in cfgs:
        pipeline.run(read(cfg))
    finish(Path(runs) / "s")

random.seed(0)
number = killed = 0
while killed < int(kills):
    pid = os.fork()
    if not pid:
        sweep()
        os._exit(0)
    time.sleep(random.uniform(0, 0.25 * (number % 8 + 1)))
    number += 1
    os.kill(pid, signal.SIGKILL)
    if os.waitpid(pid, 0)[1]:
        killed += 1
    else:  # the sweep had ended, on a quick machine after few kills: the next kills hit a new one
        shutil.rmtree(Path(runs) / "s")
"""


@pytest.mark.slow
def test_a_sweep_killed_again_and_again_ends_with_the_same_table(run, digits, tmp_path, undisturbed):
    """Twelve kills hit it at work, each at a random moment up to two seconds into it; then it runs to its end."""
    killed = subprocess.run(
        [sys.executable, "-c", KILLED, str(ROOT), str(tmp_path / "runs"), "12", *digits],
        input="\n".join(map(" ".join, POINTS)),
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert killed.returncode == 0, killed.stderr
    for point in POINTS:
        assert run("study=s", *point)["status"] == "ok"
    pd.testing.assert_frame_equal(table(tmp_path / "runs" / "s"), undisturbed)
    assert not list((tmp_path / "runs" / "s").rglob("*.part"))


@pytest.mark.slow
def test_the_command_line_killed_and_started_again(digits, tmp_path, undisturbed):
    runs = tmp_path / "runs"
    first = subprocess.Popen(command(digits, runs, "study=s"), cwd=ROOT, env=environment(), stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not list((runs / "s").glob("*/metrics.json")) and time.monotonic() < deadline:
        time.sleep(0.05)
    os.kill(first.pid, signal.SIGKILL)
    first.wait()
    done = len(list((runs / "s").glob("*/metrics.json")))
    assert done >= 1
    again = subprocess.run(
        command(digits, runs, "study=s"), cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=300
    )
    assert again.returncode == 0, again.stderr
    assert again.stdout.count("finished earlier") == done
    pd.testing.assert_frame_equal(table(runs / "s"), undisturbed)
    assert (runs / "s" / "dashboard.html").exists()


@pytest.mark.slow
def test_two_sweeps_into_one_study_do_no_work_twice(digits, tmp_path, undisturbed):
    runs = tmp_path / "runs"
    both = [
        subprocess.Popen(
            command(digits, runs, "study=s"),
            cwd=ROOT,
            env=environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for _ in range(2)
    ]
    outputs = [process.communicate(timeout=300) for process in both]
    assert [process.returncode for process in both] == [0, 0], outputs
    said = "".join(out for out, _ in outputs)
    for point in (runs / "s").glob("*/metrics.json"):
        assert said.count(f" -> {point.parent}") == 1, "each point is run by one of the two"
    assert said.count("finished earlier") == len(POINTS)
    pd.testing.assert_frame_equal(table(runs / "s"), undisturbed)


def test_a_point_another_process_is_at_is_waited_for(run, tmp_path, caplog):
    """The other process holds the point's lock, finishes it, and lets go: its result is taken over."""
    first = run("study=s")
    folder = tmp_path / "runs" / "s" / first["point"]
    kept = (folder / "metrics.json").read_text()
    (folder / "metrics.json").unlink()
    holder = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import fcntl, sys, time; f = open(sys.argv[1] + '/.lock', 'w'); fcntl.flock(f, fcntl.LOCK_EX); print(1, flush=True);"
            "time.sleep(1); open(sys.argv[1] + '/metrics.json', 'w').write(sys.stdin.read())",
            str(folder),
        ],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert holder.stdout.readline() == "1\n"
    holder.stdin.write(kept)
    holder.stdin.close()
    with caplog.at_level("INFO", logger="qexp"):
        again = run("study=s")
    holder.wait()
    holder.stdout.close()
    assert again["value"] == first["value"] and "another process is at it" in caplog.text
    assert "finished earlier" in caplog.text


DAMAGE = {
    "half": lambda b: b[: len(b) // 2],
    "empty": lambda b: b"",
    "other": lambda b: b"[1]",
    "bytes": lambda b: b"\xff\x00",
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_record_is_run_again(run, tmp_path, damage, caplog):
    first = run("study=s")
    path = tmp_path / "runs" / "s" / first["point"] / "metrics.json"
    path.write_bytes(DAMAGE[damage](path.read_bytes()))
    assert collect(tmp_path / "runs" / "s").empty and str(path) in caplog.text
    assert run("study=s")["value"] == first["value"]
    assert list(collect(tmp_path / "runs" / "s")["status"]) == ["ok"]


def test_a_disk_that_fills_up_costs_only_the_points_that_met_it(run, tmp_path, undisturbed, monkeypatch):
    """Every write fails after the first point, the record of the failure too; with room again, the sweep ends as it should."""
    assert run("study=s", *POINTS[0])["status"] == "ok"

    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as disk:
        for method in ("write_text", "write_bytes", "mkdir"):
            disk.setattr(Path, method, full)
        disk.setattr(np, "save", full)
        for point in POINTS[1:]:
            failed = run("study=s", *point)
            assert failed["status"] == "failed" and "No space left" in failed["error"]
    assert list(collect(tmp_path / "runs" / "s")["status"]) == ["ok"], "no half record is left"
    for point in POINTS:
        assert run("study=s", *point)["status"] == "ok"
    pd.testing.assert_frame_equal(table(tmp_path / "runs" / "s"), undisturbed)


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 160 KiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=160k", "tmpfs", str(folder)], capture_output=True)
    if made.returncode:
        pytest.skip("no right to mount a file system")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.mark.slow
def test_a_full_disk_from_the_command_line(digits, tmp_path, small_disk, undisturbed):
    """Points and page do not fit: the sweep ends, non-zero, with every failure reported; with room, it ends with the same table."""
    first = subprocess.run(
        command(digits, small_disk, "study=s"), cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=300
    )
    assert first.returncode == 1, first.stdout + first.stderr
    assert "No space left on device" in first.stdout + first.stderr
    subprocess.run(["mount", "-o", "remount,size=64m", str(small_disk)], check=True)
    again = subprocess.run(
        command(digits, small_disk, "study=s"), cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=300
    )
    assert again.returncode == 0, again.stdout + again.stderr
    pd.testing.assert_frame_equal(table(small_disk / "s"), undisturbed)


def test_a_failure_keeps_its_row_only_until_its_point_succeeds(run, tmp_path):
    missing = run("study=s", "dataset.data._target_=qexp.data.digits.Nothing")
    assert missing["status"] == "failed"
    weights = tmp_path / "weights.safetensors"
    weights.write_bytes(b"damaged")
    damaged = run("study=s", f"weights={weights}")
    assert damaged["status"] == "failed" and damaged["point"] != missing["point"]
    assert len(collect(tmp_path / "runs" / "s")) == 2
    from qexp.models.digits_cnn import DigitsCNN
    from qexp.models.weights import save_weights

    save_weights(DigitsCNN(width=8), weights)
    repaired = run("study=s", f"weights={weights}")
    assert repaired["status"] == "ok" and repaired["point"] != damaged["point"], "other contents, another point"
    rows = collect(tmp_path / "runs" / "s").set_index("point")
    assert damaged["point"] not in rows.index and set(rows.status) == {"ok", "failed"}
    assert rows.loc[missing["point"], "status"] == "failed", "that request has not succeeded"


def test_a_point_that_failed_before_its_data_could_be_read(run, tmp_path, monkeypatch):
    with monkeypatch.context() as patched:
        patched.setattr(pipeline, "load_data", lambda _: (_ for _ in ()).throw(OSError("the disk is away")))
        failed = run("study=s")
    assert failed["status"] == "failed" and failed["point"].startswith("failed-")
    assert json.loads((tmp_path / "runs" / "s" / failed["point"] / "metrics.json").read_text())["status"] == "failed"
    succeeded = run("study=s")
    assert [p.name for p in (tmp_path / "runs" / "s").iterdir()] == [succeeded["point"]]


@pytest.mark.slow
def test_a_damaged_checkpoint_is_trained_again(run, tmp_path, caplog):
    options = (
        "study=s",
        "quant=lsq",
        "schedule=qat",
        "schedule.epochs=1",
        "trainer.limit_train_batches=2",
        "bits=w4a4",
    )
    first = run(*options)
    folder = tmp_path / "runs" / "s" / first["point"]
    last = folder / "checkpoints" / "last.ckpt"
    last.write_bytes(last.read_bytes()[:1000])
    (folder / "metrics.json").unlink()
    again = run(*options)
    assert again["status"] == "ok" and again["value"] == first["value"] and "is damaged" in caplog.text
