"""The points of a sweep are counted, and each is read before the first one runs."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from qexp.command.sweeps import points, points_of

ROOT = Path(__file__).parents[2]
STARTING = """
import sys
from pathlib import Path
import hydra
from qexp.command.root import register
register()

@hydra.main(version_base="1.3", config_path=sys.argv.pop(), config_name="config")
def main(cfg):
    with open(Path(cfg.runs_dir) / "ran", "a") as file:
        file.write(f"{cfg.seed} {cfg.layer_wbit}\\n")
    return {"status": "ok", "point": "p"}

main()
"""


def started(folder: Path, *sweep: str) -> tuple[subprocess.CompletedProcess, list[str]]:
    """Starts a sweep whose points do nothing, and returns how it ended and which of them ran."""
    command = [sys.executable, "-c", STARTING, "-m", *sweep, f"runs_dir={folder}", str(ROOT / "conf")]
    done = subprocess.run(command, cwd=ROOT, env=os.environ, capture_output=True, text=True, check=False)
    return done, (folder / "ran").read_text().splitlines() if (folder / "ran").exists() else []


def sweep(*task: str, target: str = "hydra._internal.core_plugins.basic_sweeper.BasicSweeper", **params: str):
    return OmegaConf.create(
        {"hydra": {"sweeper": {"_target_": target, "params": params}, "overrides": {"task": list(task)}}}
    )


def test_the_points_of_a_sweep_are_counted() -> None:
    assert points_of(sweep("quant=minmax,mse", "bits=w8a8,w4a4,w2a2", "seed=range(0,4)", "model=resnet20")) == 24
    assert points_of(sweep("quant=mse", "passes=[equalize,bias_correction]")) == 1, (
        "a list of one choice is none of choices"
    )
    assert points_of(sweep("quant=mse,aciq", quant="minmax,mse,lsq", seed="0,1")) == 4, (
        "the command line wins over the preset"
    )
    assert points_of(sweep("quant=mse,aciq", target="hydra_plugins.other.OptunaSweeper")) is None


def test_a_points_overrides_are_those_that_the_sweeper_gives_it() -> None:
    asked = sweep("+x='a b',c", "layer_wbit=[2,3],4", "seed=1", seed="5,6")
    assert points(asked) == [
        [a, b, c] for a in ["seed=1"] for b in ["+x='a b'", "+x=c"] for c in ["layer_wbit=[2,3]", "layer_wbit=4"]
    ]


@pytest.mark.parametrize(
    ("asked", "count", "words"),
    [
        (("seed=0,-1", "layer_wbit=2,3"), "2 of 4 points ask", "seed=-1 layer_wbit=2 -> seed=-1 is not allowed"),
        (("n_calibrate=8,many",), "1 of 2 points asks", "n_calibrate=many -> n_calibrate="),
        (("bn=fold,fodl", "seed=1"), "1 of 2 points asks", "bn=fodl -> bn=fodl (did you mean 'fold'?)"),
        (("weights='${nowhere}',random",), "1 of 2 points asks", "nowhere"),
        (("layer_wbit=4,40,abc",), "2 of 3 points ask", "layer_wbit=abc -> layer_wbit: got 'abc'; allowed are whole"),
        (("weights=random,nowhere/net.pth",), "1 of 2 points asks", "weights=nowhere/net.pth: no such file"),
        (("plan=null,nowhere/layers.csv",), "1 of 2 points asks", "plan=nowhere/layers.csv: cannot be read"),
        (("study=a,../b",), "1 of 2 points asks", "study='../b' is not allowed"),
    ],
)
def test_a_sweep_with_a_point_that_is_not_allowed_runs_none(tmp_path, asked, count, words) -> None:
    done, ran = started(tmp_path, *asked)
    assert done.returncode == 1 and not ran, done.stdout + done.stderr
    assert f"{count} for what is not allowed; none was run" in done.stderr and words in done.stderr
    assert "Traceback" not in done.stderr and not list(tmp_path.iterdir())


def test_a_sweep_whose_points_are_allowed_runs_them_all(tmp_path) -> None:
    done, ran = started(tmp_path, "layer_wbit=2,3", "seed=1,2", "study='${hydra:job.num}'")
    assert ran == ["1 2", "2 2", "1 3", "2 3"], done.stdout + done.stderr


def test_a_choice_that_does_not_exist_is_named_by_hydra(tmp_path) -> None:
    done, ran = started(tmp_path, "quant=minmax,nothing")
    assert done.returncode != 0 and not ran and "nothing" in done.stderr
