"""A choice or a key that there is not is answered with the nearest that there is, before anything runs."""

import subprocess
import sys
from pathlib import Path

import pytest

from qexp.choices import check_choices, check_runs_dir, rules_added
from qexp.errors import QexpError

ROOT = Path(__file__).parents[1]
CONF = ROOT / "conf"


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ("quant=adarond", "quant has no choice 'adarond' (did you mean 'adaround'"),
        ("quant=minmax,adarond", "no choice 'adarond'"),
        ("passes=[equalise]", "passes has no choice 'equalise' (did you mean 'equalize'?)"),
        ("passes=[],equalize,[equalize,bias_corection]", "no choice 'bias_corection' (did you mean 'bias_correction'"),
        ("+passes=equalise", "no choice 'equalise'"),
        ("model@schedule.distill.teacher=resnet57", "did you mean 'resnet56'"),
        ("layer_wbt=3", "there is no key 'layer_wbt' (did you mean 'layer_wbit'"),
        ("schedul=qat", "there is no key 'schedul' (did you mean 'schedule'"),
    ],
)
def test_the_message_names_the_nearest(asked, said):
    with pytest.raises(QexpError) as caught:
        check_choices([asked], CONF)
    assert said in str(caught.value) and str(caught.value).startswith(asked)
    assert "allowed are" in str(caught.value) or "--cfg job" in str(caught.value)
    assert "_ends" not in str(caught.value), "what recipes are made of is no choice"


@pytest.mark.parametrize(
    "fine",
    [
        "quant=minmax,mse",
        "passes=[],equalize,[equalize,bias_correction]",
        "bits=choice(w4a4,w2a2)",
        "quant=glob(a*)",
        "experiment=null",
        "~search",
        "+anything=1",
        "quant.rules.x={layers: conv1}",
        "hydra/launcher=joblib",
        "--cfg=job",
        "a broken (word=",
    ],
)
def test_what_is_right_or_not_ours_to_judge_passes(fine):
    check_choices([fine], CONF)


def test_a_new_rule_needs_no_plus(compose):
    words = rules_added(
        ["quant=mse", 'quant.rules.wide={layers: "layer1.*", weight: {bits: 6}}', "+quant.rules.x=null"]
    )
    assert words[2] == "+quant.rules.x=null"
    assert compose(*words[:2]).quant.rules.wide.weight.bits == 6
    assert compose("quant=lsq", *rules_added(["quant.rules.ends.weight.bits=6"])).quant.rules.ends.weight.bits == 6


def test_quoted_patterns_are_answered():
    with pytest.raises(QexpError, match="without quotes"):
        check_choices(['layer_wbit={"layer1.*": 4}'], CONF)
    check_choices(["layer_wbit={layer1.*: 4}"], CONF)


def test_a_folder_for_runs_that_cannot_be_made_is_one_sentence(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(QexpError, match="cannot be made"):
        check_runs_dir([f"runs_dir={tmp_path / 'file' / 'runs'}"])
    check_runs_dir([f"runs_dir={tmp_path / 'new'}", "quant=mse"])
    assert (tmp_path / "new").is_dir()


def test_choices_of_another_folder_count(tmp_path):
    (tmp_path / "quant").mkdir()
    (tmp_path / "quant" / "mine.yaml").write_text("name: mine\n")
    for given in (["--config-dir", str(tmp_path)], [f"--config-dir={tmp_path}"]):
        check_choices([*given, "quant=mine"], CONF)
    with pytest.raises(QexpError, match="did you mean 'mine'"):
        check_choices(["--config-dir", str(tmp_path), "quant=mein"], CONF)


def test_the_command_line_ends_with_it_and_without_a_traceback():
    done = subprocess.run(
        [sys.executable, "run.py", "quant=adarond"], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 1 and "did you mean 'adaround'" in done.stderr and "Traceback" not in done.stderr
