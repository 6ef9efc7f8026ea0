"""A choice that one group makes for another is logged once; a file's name is its `name` where it gives none."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from qexp.command.chosen import chosen_by, named
from qexp.command.folders import CONF
from qexp.command.root import register

ROOT = CONF.parent


def asked(*words: str, folders: tuple[Path, ...] = (CONF,)) -> dict[str, str]:
    register()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        hydra = compose("config", list(words), return_hydra_config=True).hydra
    return chosen_by(hydra.runtime.choices, words, folders)


@pytest.mark.parametrize(
    ("words", "found"),
    [
        ([], {}),
        (["quant=lsq"], {"schedule=qat": "quant=lsq"}),
        (["quant=placed/toynet/mpact_integer_bn"], {"schedule=qat": "quant=placed/toynet/mpact_integer_bn"}),
        (["quant=reactnet", "bits=w1a1"], {"schedule=one_bit": "quant=reactnet"}),
        (["model=resnet20"], {"dataset=cifar10": "model=resnet20"}),
        (["model=ssd300_vgg16_tv"], {"dataset=voc2007": "model=ssd300_vgg16_tv"}),
        (["model=resnet20", "quant=pact"], {"dataset=cifar10": "model=resnet20", "schedule=qat": "quant=pact"}),
        (["quant=lsq", "schedule=qat"], {}),
        (["quant=lsq", "schedule=ptq"], {}),
        (["model=resnet20", "dataset=digits"], {}),
        (["model=resnet18"], {}),
    ],
)
def test_who_chose_what(words, found):
    assert asked(*words) == found


def test_an_experiment_beats_what_its_choices_choose():
    found = asked("experiment=ptq_ladder", "quant=lsq")
    assert found["schedule=ptq"] == "experiment=ptq_ladder" and "schedule=qat" not in found
    assert found["model=resnet20"] == found["dataset=cifar10"] == "experiment=ptq_ladder"
    found = asked("experiment=one_bit_w1a1")
    assert found["model@schedule.distill.teacher=resnet20"] == "experiment=one_bit_w1a1"


def test_a_name_that_a_file_leaves_out_is_the_files():
    cfg = OmegaConf.create({"model": {"net": {}}, "dataset": {"name": "d"}, "schedule": {"distill": {"teacher": {}}}})
    OmegaConf.set_struct(cfg, True)
    named(cfg, {"model": "folder/mine", "dataset": "x", "model@schedule.distill.teacher": "big", "trainer": "cpu"})
    assert (cfg.model.name, cfg.dataset.name, cfg.schedule.distill.teacher.name) == ("mine", "d", "big")


def test_runs_and_sweeps_say_it_once(tmp_path):
    """A file of one line, and a method that learns, at two widths without a file: one line names the choice that set the schedule."""
    (tmp_path / "conf" / "model").mkdir(parents=True)
    (tmp_path / "conf" / "model" / "mine.yaml").write_text(
        "net: {_target_: qexp.models.digits_cnn.DigitsCNN, width: 4}\n"
    )
    words = ["model=mine", "quant=lsq", "bits=w2a3,w5a3", "debug=fast", "trainer=cpu", f"runs_dir={tmp_path / 'runs'}"]
    done = subprocess.run(
        [sys.executable, "run.py", "--config-dir", str(tmp_path / "conf"), "-m", *words, "study=s"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    said = done.stdout + done.stderr
    assert done.returncode == 0, said[-2000:]
    assert said.count("schedule=qat (chosen by quant=lsq)") == 1 and "W2A3" in said and "W5A3" in said
    assert "mine" in (tmp_path / "runs" / "s" / "results.csv").read_text()
