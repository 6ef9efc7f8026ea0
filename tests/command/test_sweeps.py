"""The configurations of a sweep are composed once: for the check and for the point."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from omegaconf import OmegaConf

from qexp.command.sweeps import Checked

ROOT = Path(__file__).parents[2]
COUNTING = """
import sys
from hydra._internal.config_loader_impl import ConfigLoaderImpl
composed, compose = [], ConfigLoaderImpl.load_sweep_config

def counting(self, master_config, sweep_overrides):
    composed.append(sweep_overrides)
    return compose(self, master_config, sweep_overrides)

ConfigLoaderImpl.load_sweep_config = counting
import hydra
from qexp.command.root import register
register()

@hydra.main(version_base="1.3", config_path=sys.argv.pop(), config_name="config")
def main(cfg):
    print("RAN", cfg.layer_wbit, cfg.seed, hydra.core.hydra_config.HydraConfig.get().job.num)
    return {"status": "ok"}

main()
print("COMPOSED", len(composed))
"""


def test_each_point_of_a_sweep_is_composed_once(tmp_path):
    sweep = ["-m", "layer_wbit=2,3", "seed=1,2", f"runs_dir={tmp_path}", str(ROOT / "conf")]
    command = [sys.executable, "-c", COUNTING, *sweep]
    done = subprocess.run(command, cwd=ROOT, env=os.environ, capture_output=True, text=True, check=False)
    lines = [line for line in done.stdout.splitlines() if line.startswith(("RAN", "COMPOSED"))]
    assert lines == ["RAN 2 1 0", "RAN 2 2 1", "RAN 3 1 2", "RAN 3 2 3", "COMPOSED 4"], done.stderr


def composer(made: list[list[str]]):
    def compose(master, overrides):
        made.append(overrides)
        return OmegaConf.create({"number": len(made)})

    return compose


def test_what_was_checked_is_handed_out_once():
    made: list[list[str]] = []
    load = Checked(composer(made), held=2)
    checked = [load(None, [f"x={i}"]) for i in range(3)]
    again = []
    for i in range(3):
        again.append(load(None, [f"x={i}"]))
        load.started(again[-1])
    assert again[0] is checked[0] and again[1] is checked[1], "two are held"
    assert again[2] is not checked[2] and not load.waiting and len(made) == 4
    assert load(None, ["x=0"]) is not checked[0], "a point's configuration is its own"


def test_the_same_point_twice_has_two_configurations():
    load = Checked(composer([]))
    for _ in range(2):
        load(None, ["x=1"])
    first, second = load(None, ["x=1"]), load(None, ["x=1"])
    assert first is not second


def test_without_a_check_no_point_gets_the_configuration_of_one_that_ran():
    load = Checked(composer([]))
    for _ in range(2):
        first = load(None, ["x=1"])
        load.started(first)
        assert load(None, ["x=1"]) is not first and not load.waiting
