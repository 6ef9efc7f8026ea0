"""Every value that a run cannot have is one sentence with its key and what is allowed, before anything runs."""

from __future__ import annotations

import pytest

from qexp.errors import QexpError
from qexp.run.settings import Settings, read

WRONG = [
    ("seed=-1", "seed=-1 is not allowed; use a whole number from 0 to 4294967295"),
    ("seed=1e20", "seed=1e+20"),
    ("seed=three", "seed=three"),
    ("schedule=qat schedule.epochs=-1", "schedule.epochs=-1"),
    ("schedule=qat schedule.epochs=abc", "schedule.epochs=abc is not allowed; use a whole number from 0"),
    ("schedule.epochs=1.5", "schedule.epochs=1.5"),
    ("schedule=qat schedule.optimizer.lr=-1", "schedule.optimizer.lr=-1 is not allowed; use a number at least 0"),
    ("schedule=qat schedule.optimizer=null", "schedule.optimizer"),
    ("schedule=qat schedule.label_smoothing=2", "at least 0 and below 1"),
    ("schedule=qat schedule.gradient_clip=-1", "schedule.gradient_clip=-1 is not allowed; use a number above 0"),
    ("schedule=qat schedule.max_steps=0", "use a number from 1, or -1 for no limit"),
    ("schedule=qat schedule.ema=1.5", "schedule.ema=1.5"),
    ("schedule=qat schedule.distill.temperature=0", "schedule.distill.temperature=0"),
    ("schedule=qat schedule.two_step=1.5", "schedule.two_step=1.5 is not allowed; use a number above 0 and below 1"),
    ("schedule.pretrain.epochs=-2", "schedule.pretrain.epochs=-2"),
    ("max_samples=0", "max_samples=0"),
    ("max_samples=-3", "max_samples=-3"),
    ("dataset.data.eval_batch_size=2.5", "dataset.data.eval_batch_size=2.5 is not allowed; use a whole number from 1"),
    ("dataset.data.batch_size=0", "dataset.data.batch_size=0"),
    ("dataset.data.std=[0]", "dataset.data.std=0 is not allowed; use a number above 0"),
    ("dataset.data.augment.padding=-1", "dataset.data.augment.padding=-1"),
    ("dataset.num_classes=0", "dataset.num_classes=0"),
    ("quant.weight=8", "quant.weight=8 is not allowed; use null (float) or a mapping"),
    ("trainer.precision=64-true", "use 32-true, bf16-mixed, 16-mixed"),
    ("trainer.precision=16-true", "trainer.precision=16-true"),
    ("trainer.precision=bf16-true", "trainer.precision=bf16-true"),
    ("trainer.limit_test_batches=0", "trainer.limit_test_batches=0"),
    ("+trainer.logger=true", "every run writes its curves and figures into its own folder"),
    (
        "+trainer.logger._target_=pytorch_lightning.loggers.CSVLogger +trainer.logger.save_dir=x",
        "CSVLogger is not allowed",
    ),
    ("+trainer.max_epochs=3", "set schedule.epochs"),
    ("+trainer.gradient_clip_val=0.5", "set schedule.gradient_clip"),
    ("model.first=7", "model.first=7 is not allowed; use the name of a layer"),
    ("model.last=[fc,3]", "model.last="),
    ("dataset.data.size=0", "dataset.data.size=0"),
    ("dataset.data.seed=-1", "dataset.data.seed=-1"),
    ("quant.input.granularity=7", "quant.input.granularity=7 is not allowed; use a word, such as tensor, channel"),
    ("+quant.pixels=close", "quant.pixels=close"),
    ("kernels=null", "kernels=null"),
    ("verify=-1", "verify=-1"),
    ("accumulator=[16,70]", "accumulator=70 is not allowed; use a whole number from 2 to 64"),
    ("n_calibrate=-4", "n_calibrate=-4"),
    ("ends_bit=0", "ends_bit=0"),
    ("bn=folded", "did you mean 'fold'?"),
    ("kernels=cudaa", "did you mean 'cuda'?"),
    ("rounding=up", "rounding=up is not allowed; use float or integer"),
    ("study=" + "x" * 256, "use a name of 1 to 255 bytes"),
    ("layer_abit=x", "layer_abit: got 'x'; allowed are whole numbers of bits 1..16, or 32 for float"),
    ("layer_wbit=17", "layer_wbit: got 17"),
    ("layer_wbit=[8,4.5,...]", "layer_wbit[1]: got 4.5"),
    ("layer_wbit=[8,...,4]", "layer_wbit[1]: got '...'"),
    ("layer_abit={conv1:0}", "layer_abit[conv1]: got 0"),
    ("+quant.weight.bits=99", "quant.weight.bits: got 99"),
    (
        "+quant.rules.r={layers:conv1,bias:{bits:33}}",
        "quant.rules.r.bias.bits: got 33; allowed are whole numbers of bits 1..31",
    ),
    ("+quant.rules.r={layers:conv1,input.0:{bits:x}}", "quant.rules.r.input.0.bits: got 'x'"),
    ("study=${nothing.here}", "study: Interpolation key 'nothing.here' not found"),
]


@pytest.mark.parametrize(("overrides", "words"), WRONG, ids=[line[:40] for line, _ in WRONG])
def test_a_value_out_of_bounds_is_one_sentence(compose, overrides, words):
    with pytest.raises(QexpError) as caught:
        read(compose(*overrides.split()))
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_a_node_without_a_target_says_what_is_missing(compose):
    with pytest.raises(QexpError, match="search has no _target_"):
        read(compose("+search={widths: [2]}"))


def test_settings_of_a_written_configuration_are_the_same(compose):
    import yaml

    asked = read(compose("quant=lsq", "bits=w4a4", "schedule=qat"))
    again = Settings.of(yaml.safe_load(asked.yaml))
    assert again == asked and again.schedule.kind == "qat" and again.trains


def test_the_kind_of_a_schedule_and_not_its_name_decides(compose):
    named = read(compose("schedule=float_adamw"))
    assert named.schedule.is_float and named.schedule.name == "float_adamw" and not named.trains
    scratch = read(compose("schedule=qat_scratch", "schedule.name=long", "quant=lsq"))
    assert scratch.schedule.from_scratch and scratch.trains and not scratch.schedule.is_float


@pytest.mark.filterwarnings("ignore:Initializing zero-element")
def test_a_network_without_width_is_refused_before_it_runs(run):
    found = run("model.net.width=0", "weights=null")
    assert (
        found["error"]
        == "QexpError: model.net: conv1.weight has no elements ([0, 1, 3, 3]); give the network a width of at least 1"
    )
