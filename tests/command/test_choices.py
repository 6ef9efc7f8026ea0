"""A choice or a key that there is not is answered with the nearest that there is, before anything runs."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser

from qexp.command.choices import check_choices, check_runs_dir, key_maps_quoted, rules_added
from qexp.command.listing import offered
from qexp.command.renamed import OPTIONS, RENAMED
from qexp.errors import QexpError

ROOT = Path(__file__).parents[2]
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
        ("schedul.epochs=3", "there is no key 'schedul' (did you mean 'schedule'"),
        ("trainer.precison=16", "there is no key 'trainer.precison' (did you mean 'trainer.precision'"),
        ("schedule.optimiser.lr=1", "there is no key 'schedule.optimiser' (did you mean 'schedule.optimizer'"),
        (
            "schedule.optimizer.lrr=1,2",
            "there is no key 'schedule.optimizer.lrr' (did you mean 'schedule.optimizer.lr'",
        ),
        ("dataset.data.calibration=4", "did you mean 'dataset.data.calibration_size'"),
        ("quant.weight.roundign=floor", "with a plus, +quant.weight.roundign="),
    ],
)
def test_the_message_names_the_nearest(asked, said):
    with pytest.raises(QexpError) as caught:
        check_choices([asked], CONF)
    assert said in str(caught.value) and str(caught.value).startswith(asked)
    assert "allowed are" in str(caught.value) or "--cfg job" in str(caught.value)
    assert "_ends" not in str(caught.value), "what recipes are made of is no choice"


def test_options_of_an_optimizer_that_is_not_chosen_are_refused():
    for words in (["optimizer.lr=0.1"], ["quant=lsq", "scheduler.final=0.1", "optimizer=sgd"]):
        with pytest.raises(
            QexpError, match=r"is chosen beside the schedule's own; set schedule\.(optimizer\.lr|scheduler\.final)"
        ):
            check_choices(words, CONF)
    check_choices(["optimizer=sgd", "optimizer.lr=0.1"], CONF)
    check_choices(["experiment=dorefa_pact", "optimizer.lr=0.1"], CONF)


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
        "++anything=1",
        "+trainer.max_epochs=3",
        "++trainer.max_epochs=3",
        "~trainer.precision",
        "trainer.precision=16,32",
        "quant.input.range=null",
        "schedule.epochs=3",
        "schedule.pretrain.epochs=3",
        "schedule.distill.teacher.weights=FILE",
        "passes.equalize.relu6=clip",
        "hydra.verbose=true",
        "quant.rules.x={layers: conv1}",
        "hydra/launcher=joblib",
        "--cfg=job",
        "a broken (word=",
    ],
)
def test_what_is_right_or_not_ours_to_judge_passes(fine):
    check_choices([fine], CONF)


@pytest.mark.parametrize(
    ("asked", "instead"),
    [("trainer.max_epochs=3", "schedule.epochs"), ("trainer.max_steps=9", "schedule.max_steps")],
)
def test_how_long_a_training_is_the_schedule_says(asked, instead):
    with pytest.raises(QexpError, match=f"there is no key 'trainer.max_.*set the length of training with {instead}"):
        check_choices([asked], CONF)


def test_keys_that_the_command_line_brings_itself_may_be_set():
    check_choices(["+trainer.mine={a: 1}", "trainer.mine.a=2"], CONF)
    check_choices(
        ["schedule.optimizer={_target_: torch.optim.Adam, betas: [0, 1]}", "schedule.optimizer.betas=[1,2]"], CONF
    )
    check_choices(["+quant@trainer.mine=mse", "trainer.mine.name=other"], CONF)
    with pytest.raises(QexpError, match=r"no key 'trainer\.mine'"):
        check_choices(["+trainer.mine2=1", "trainer.mine=2"], CONF)


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
    check_runs_dir([f"runs_dir={tmp_path / 'other'}", "--cfg=job"])
    assert not (tmp_path / "other").exists(), "a look at the configuration makes no folder"


def test_choices_of_another_folder_count(tmp_path):
    (tmp_path / "quant").mkdir()
    (tmp_path / "quant" / "mine.yaml").write_text("name: mine\n")
    for given in (["--config-dir", str(tmp_path)], [f"--config-dir={tmp_path}"]):
        check_choices([*given, "quant=mine"], CONF)
    with pytest.raises(QexpError, match="did you mean 'mine'"):
        check_choices(["--config-dir", str(tmp_path), "quant=mein"], CONF)
    (tmp_path / "trainer").mkdir()
    (tmp_path / "trainer" / "mine.yaml").write_text("defaults: [default]\nmax_epochs: 3\n")
    check_choices(["--config-dir", str(tmp_path), "trainer=mine", "trainer.max_epochs=4"], CONF)


@pytest.mark.parametrize(
    ("asked", "instead"),
    [
        ("quant=resnet20_pact", "write quant=placed/resnet20/pact"),
        ("quant=aciq_naive,minmax,aciq_full", "write quant=ladder/aciq/naive,minmax,ladder/aciq/full"),
        ("quant=playground_log", "write quant=sources/playground/log"),
        ("quant=lsq_channel", "write quant=lsq quant.weight.granularity=channel"),
        ("bits=toynet_cfg1s", "write bits=placed/toynet/cfg1s"),
        ("model=squeezenet_v1", "write model=squeezenet1_1"),
        ("quant/placed/toynet=pact", "write quant=placed/toynet/pact"),
    ],
)
def test_a_former_name_is_answered_with_what_to_write_now(asked, instead):
    with pytest.raises(QexpError) as caught:
        check_choices([asked], CONF)
    assert str(caught.value).startswith(asked) and str(caught.value).endswith(instead) and "\n" not in str(caught.value)
    check_choices(instead.removeprefix("write ").split(), CONF)


def test_what_former_names_are_called_now_exists(compose):
    for group, names in RENAMED.items():
        assert set(names.values()) <= set(offered([CONF], group)) and not set(names) & set(offered([CONF], group))
    for words in (text.split() for names in OPTIONS.values() for text in names.values()):
        check_choices(words, CONF)
        compose(*words)


def test_choices_are_listed_by_folder_without_the_parts_of_files():
    with pytest.raises(QexpError) as caught:
        check_choices(["quant=zzzz"], CONF)
    lines = str(caught.value).splitlines()
    assert max(map(len, lines)) <= 118 and "  placed/toynet/{dorefa, mpact, mpact_integer_bn, pact}" in lines
    assert "_pact_sites" not in str(caught.value) and "toynet/_" not in str(caught.value)
    with pytest.raises(QexpError, match="did you mean 'placed/toynet/pact'"):
        check_choices(["quant=toynet/pact"], CONF)
    with pytest.raises(QexpError, match="w<m>a<n>"):
        check_choices(["bits=w17a4"], CONF)


@pytest.mark.parametrize(
    ("bits", "widths"), [("w2a3", (2, 3)), ("w1a32", (1, 32)), ("w16a5", (16, 5)), ("w7a8", (7, 8))]
)
def test_any_pair_of_widths_is_a_choice(compose, bits, widths):
    check_choices([f"bits={bits}", f"bits=w4a4,{bits}"], CONF)
    cfg = compose(f"bits={bits}")
    assert (cfg.layer_wbit, cfg.layer_abit) == widths and compose(f"bits={bits}", "layer_wbit=6").layer_wbit == 6
    assert (cfg.quant.rules.ends.weight.bits == 7) == (bits == "w7a8"), "a file of that name wins, and may hold more"


def test_a_file_of_ones_own_beats_a_pair_of_widths(tmp_path):
    (tmp_path / "bits").mkdir()
    (tmp_path / "bits" / "w3a5.yaml").write_text(
        "# @package _global_\nlayer_wbit: 3\nlayer_abit: {fc: 5}\nends_bit: 6\n"
    )
    done = subprocess.run(
        [sys.executable, "run.py", "--config-dir", str(tmp_path), "bits=w3a5", "--cfg", "job"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0 and "ends_bit: 6" in done.stdout and "Warning" not in done.stderr, done.stderr


def test_help_lists_choices_and_no_parts_of_files():
    done = subprocess.run([sys.executable, "run.py", "--help"], cwd=ROOT, capture_output=True, text=True, timeout=60)
    listed = done.stdout.split("What the choices hold")[0]
    assert "placed/resnet20/{dorefa, mpact, pact}" in listed and "w<m>a<n>" in listed
    assert not re.search(r"[\s/{]_\w", listed), "a file that begins with _ is a part of others"
    assert "mobilenetv2 is MobileNetV2 for images of 32x32" in done.stdout


def test_the_command_line_ends_with_it_and_without_a_traceback():
    done = subprocess.run(
        [sys.executable, "run.py", "quant=adarond"], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 1 and "did you mean 'adaround'" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize(
    "word", ['model.key_map={"^net\\.": ""}', '+model.key_map={"a|b": null}', 'model.key_map={"it\'s": "x"}']
)
def test_a_typed_key_map_reaches_the_configuration(word):
    from qexp.models.key_maps import parsed

    (quoted,) = key_maps_quoted([word])
    value = OverridesParser.create().parse_override(quoted).value()
    assert parsed(value) == parsed(word.partition("=")[2])


def test_letters_that_need_quotes_are_told():
    with pytest.raises(QexpError, match=r"only in quotes of its own; write 'plan=\"pl\u00e4ne/x.csv\"'"):
        check_choices(["plan=pl\u00e4ne/x.csv"], CONF)
    check_choices(['plan="pl\u00e4ne/x.csv"'], CONF)


@pytest.mark.parametrize("word", ["study=a\nb", "study=a\x1b[31mb", "weights=x\r.pt", "plan=a\x00b", "quant=mse\n"])
def test_control_characters_are_answered_in_one_line(word):
    with pytest.raises(QexpError, match="leave out control characters and line ends") as said:
        check_choices([word], CONF)
    assert str(said.value).isprintable()


@pytest.mark.parametrize("name", ["a\tb", "a\u2028b", "a\u200bb"])
def test_no_folder_gets_a_name_that_cannot_be_seen(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for word in (f"runs_dir={name}", f"runs_dir='{name}'"):
        with pytest.raises(QexpError) as said:
            check_choices([word], CONF)
            check_runs_dir([word])
        assert str(said.value).isprintable() or "only in quotes" in str(said.value)
    assert list(tmp_path.iterdir()) == []
