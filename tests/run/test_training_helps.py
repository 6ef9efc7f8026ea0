"""What helps a training with quantizers: each option has its documented effect, and a resumed run is the uninterrupted one."""

from __future__ import annotations

import json
from pathlib import Path

import pandas as pd
import pytest
import torch
from pytorch_lightning import Callback

from qexp.layers import quantizers
from qexp.models.weights import save_weights
from qexp.recipe.plan import Entry, Plan, Source
from qexp.run import pipeline, stages, training
from qexp.run.settings import read
from tests.run.test_training import Stop

QAT = ("schedule=qat", "quant=lsq", "bits=w2a2", "trainer.limit_train_batches=4", "study=s")
DISTILL = ("schedule.distill.logits=1", "schedule.distill.features=0.1")


def point(tmp_path: Path, metrics: dict) -> Path:
    assert metrics["status"] == "ok", metrics["error"]
    return tmp_path / "runs" / metrics["study"] / metrics["point"]


def final_state(tmp_path: Path, metrics: dict) -> dict:
    return torch.load(point(tmp_path, metrics) / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(v, b[k]) for k, v in a.items())


@pytest.fixture
def killed(run, monkeypatch):
    """Call with overrides and a number: the training of that number (from 0) dies after its first epoch; the failed metrics."""

    def one(number: int, *overrides: str) -> dict:
        make_trainer, calls = training.make_trainer, []

        def dying(settings, phase, folder, callbacks=None, **rest):
            fits = rest.get("max_epochs") is not None
            calls.extend([phase] * fits)
            extra = [Stop()] if fits and len(calls) == number + 1 else []
            return make_trainer(settings, phase, folder, [*(callbacks or []), *extra], **rest)

        with monkeypatch.context() as patched:
            patched.setattr(training, "make_trainer", dying)
            metrics = run(*overrides)
        assert metrics["status"] == "failed" and "the machine went down" in metrics["error"]
        return metrics

    return one


HELPS = {
    "ema": ("schedule.ema=0.9", "schedule.epochs=2"),
    "oscillation": ("schedule.oscillation.freeze=0.005", "schedule.oscillation.dampen=0.01", "schedule.epochs=2"),
    "everything": (
        *DISTILL,
        "schedule.ema=0.9",
        "schedule.oscillation.freeze=[0.008,0.004]",
        "schedule.progressive=[4]",
        "schedule.quantizer.lr=1e-4",
        "schedule.epochs=3",
    ),
    "distill": (*DISTILL, "schedule.epochs=2"),
    "progressive": ("schedule.progressive={8: 1, 4: 2}", "schedule.epochs=5"),
}


@pytest.mark.parametrize("help_", HELPS)
def test_a_resumed_run_is_the_uninterrupted_one(run, tmp_path, killed, help_):
    options = (*QAT, *HELPS[help_])
    through = run(*options, "study=through")
    half = killed(1 if "schedule.progressive" in str(options) else 0, *options)
    resumed = run(*options)
    assert half["point"] == resumed["point"] and resumed["value"] == through["value"]
    assert same(final_state(tmp_path, through), final_state(tmp_path, resumed))


def test_the_teacher_is_the_runs_own_float_network_and_is_not_saved(run, tmp_path):
    plain = run(*QAT, "schedule.epochs=1")
    taught = run(*QAT, "schedule.epochs=1", *DISTILL)
    ours, theirs = final_state(tmp_path, plain), final_state(tmp_path, taught)
    assert ours.keys() == theirs.keys(), "no teacher in the checkpoint"
    assert not same(ours, theirs), "the teacher's output changes what is learned"
    assert taught["quant"] == "lsq + distilled with features" and plain["quant"] == "lsq"


def test_another_model_can_teach(run, tmp_path):
    from qexp.models.digits_cnn import DigitsCNN

    torch.manual_seed(1)
    save_weights(DigitsCNN(width=12), tmp_path / "big.safetensors")
    teacher = (
        "model@schedule.distill.teacher=digits_cnn",
        "schedule.distill.teacher.net.width=12",
        f"schedule.distill.teacher.weights={tmp_path / 'big.safetensors'}",
        "schedule.distill.logits=1",
        "schedule.epochs=1",
    )
    own = run(*QAT, "schedule.distill.logits=1", "schedule.epochs=1")
    other = run(*QAT, *teacher)
    assert other["quant"] == "lsq + distilled from digits_cnn"
    assert not same(final_state(tmp_path, own), final_state(tmp_path, other))
    save_weights(DigitsCNN(width=12, num_classes=7), tmp_path / "seven.safetensors")
    refused = run(
        *QAT,
        *teacher,
        "schedule.distill.teacher.net.num_classes=7",
        f"schedule.distill.teacher.weights={tmp_path / 'seven.safetensors'}",
    )
    assert refused["status"] == "failed" and "has 7 classes, the data set has 10" in refused["error"]


def test_random_weights_teach_nothing(run):
    refused = run("schedule=qat_scratch", "quant=lsq", "weights=null", "schedule.epochs=1", "schedule.distill.logits=1")
    assert refused["status"] == "failed" and "name one" in refused["error"]


def test_stages_narrow_the_recipe_and_are_recorded(run, tmp_path, monkeypatch):
    seen, fit = [], training.fit

    def watched(module, *args, **options):
        bits = {f"{n}.{s}": q.bits for n, s, q in quantizers(module.model)}
        scales = {f"{n}.{s}": q.scale.detach().clone() for n, s, q in quantizers(module.model)}
        seconds = fit(module, *args, **options)
        seen.append((bits, scales, {f"{n}.{s}": q.scale.detach().clone() for n, s, q in quantizers(module.model)}))
        return seconds

    monkeypatch.setattr(training, "fit", watched)
    metrics = run(*QAT, "schedule.progressive=[8,4]", "schedule.epochs=4")
    assert [s["bits"] for s in metrics["stages"]] == [8, 4, None]
    assert [s["epochs"] for s in metrics["stages"]] == [1, 1, 2] and metrics["quant"] == "lsq + progressive 8-4"
    assert [b["conv2.weight"] for b, _, _ in seen] == [8, 4, 2] and {b["conv1.weight"] for b, _, _ in seen} == {8}
    assert torch.equal(seen[1][1]["conv1.weight"], seen[0][2]["conv1.weight"]), "the ends keep what they have learned"
    assert seen[1][1]["conv2.weight"] > 4 * seen[0][2]["conv2.weight"], "fewer levels, a wider step"
    curves = pd.read_csv(point(tmp_path, metrics) / "curves.csv")
    assert sorted(curves[curves.name == "val_top1"].step) == [4, 8, 12, 16], "the curves go on from stage to stage"
    assert sorted(curves[curves.name == "val_top1"].epoch) == [0, 1, 2, 3]
    done = json.loads((point(tmp_path, metrics) / "checkpoints" / "stages" / "done.json").read_text())
    assert [s["bits"] for s in done] == [8, 4]
    table = pd.read_csv(point(tmp_path, metrics) / "layers.csv")
    assert set(table[table.layer == "conv2"].bits) == {2}


def test_no_epochs_images_are_seen_twice(run, monkeypatch):
    from qexp.data.tensors import TensorLoader

    epochs, set_epoch = [], TensorLoader.set_epoch

    def noted(self, epoch):
        epochs.append(epoch)
        set_epoch(self, epoch)

    monkeypatch.setattr(TensorLoader, "set_epoch", noted)
    metrics = run(*QAT, "schedule.progressive=[4]", "schedule.epochs=3")
    assert metrics["status"] == "ok", metrics["error"]
    assert sorted(set(epochs)) == [0, 1, 2]


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ("[4,8]", "give falling widths"),
        ("[8,1]", "give falling widths"),
        ("[8,4,3]", "each needs one whole epoch"),
        ("[2]", "changes nothing"),
        ("{4: 3}", "each needs one whole epoch"),
    ],
)
def test_stages_that_cannot_be_are_refused(run, asked, said):
    refused = run(*QAT, f"schedule.progressive={asked}", "schedule.epochs=3")
    assert refused["status"] == "failed" and said in refused["error"]


def test_every_method_that_learns_can_be_narrowed(compose, digits, tmp_path):
    for quant in ("pact", "dorefa", "minmax"):
        cfg = compose(
            *digits,
            *QAT,
            f"quant={quant}",
            "schedule=qat",
            "bits=w4a4",
            "schedule.progressive=[8]",
            "schedule.epochs=2",
            f"runs_dir={tmp_path / 'runs'}",
        )
        metrics = pipeline.run(read(cfg))
        assert metrics["status"] == "ok", metrics["error"]
        assert [s["bits"] for s in metrics["stages"]] == [8, None]


def test_a_plain_schedule_is_one_stage(compose):
    plan = Plan((Entry("conv", "weight", {}, 2, Source.WIDTH, "layer_wbit"),))
    assert stages.stages(read(compose("schedule=qat", "schedule.epochs=3")).schedule, plan) == [stages.Stage(None, 3)]
    assert stages.stages(read(compose("schedule=ptq")).schedule, plan) == [stages.Stage(None, 0)]


@pytest.mark.parametrize(
    ("with_it", "without"), [("[8,4,2]", "[8,4]"), ("{8: 1, 4: 2, 2: 3}", "{8: 1, 4: 2}"), ("{4: 1, 2: 1}", "{4: 1}")]
)
def test_the_final_width_may_be_named_as_the_last_stage(compose, with_it, without):
    plan = Plan(
        (
            Entry("ends", "weight", {}, 8, Source.RULE, "ends"),
            Entry("conv", "weight", {}, 2, Source.WIDTH, "layer_wbit"),
        )
    )

    def asked(widths: str) -> list[stages.Stage]:
        return stages.stages(
            read(compose("schedule=qat", "schedule.epochs=6", f"schedule.progressive={widths}")).schedule, plan
        )

    assert asked(with_it) == asked(without) and asked(with_it)[-1].bits is None


def test_what_is_evaluated_is_the_average(run, tmp_path, monkeypatch):
    """The average of the live weights after each step, taken by hand, is what is scored and saved as the network."""
    live, updates = {}, []

    class Watch(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            n = len(updates)
            d = min(0.9, (1 + n) / (10 + n))
            for name, value in pl_module.state_dict().items():
                if name.endswith(("num_batches_tracked", ".qmin", ".qmax", ".ready", ".numel")) or n == 0:
                    live[name] = value.clone()
                else:
                    live[name] = d * live[name] + (1 - d) * value
            updates.append(n)

    make_trainer, evaluate, scored = training.make_trainer, training.evaluate, []

    def watching(settings, phase, folder, callbacks=None, **rest):
        return make_trainer(settings, phase, folder, [*(callbacks or []), Watch()], **rest)

    def noted(model, *args):
        scored.append({k: v.clone() for k, v in model.state_dict().items()})
        return evaluate(model, *args)

    monkeypatch.setattr(training, "make_trainer", watching)
    monkeypatch.setattr(training, "evaluate", noted)
    metrics = run(*QAT, "schedule.ema=0.9", "schedule.epochs=2")
    saved = final_state(tmp_path, metrics)
    assert len(updates) == 8 and metrics["quant"] == "lsq + averaged"
    for name, value in saved.items():
        torch.testing.assert_close(value, live[name], msg=lambda m, name=name: f"{name}: {m}")
        assert torch.equal(scored[-1][name.removeprefix("model.")], value)


def test_an_averaged_training_that_had_ended_resumes_to_its_average(run, tmp_path, monkeypatch):
    options = (*QAT, "schedule.ema=0.9", "schedule.epochs=1")
    with monkeypatch.context() as patched:  # the machine goes down between training and evaluation
        patched.setattr(pipeline.outcome, "write", lambda *_: 1 / 0)
        assert run(*options)["status"] == "failed"
    resumed, anew = run(*options), run(*options, "study=anew")
    assert resumed["value"] == anew["value"] and resumed["worst_sqnr"] == anew["worst_sqnr"]


def test_options_without_sense_are_refused(run):
    for asked, said in (
        ("schedule.oscillation.freeze=2", "a frequency between 0 and 1"),
        ("schedule.oscillation.dampen=-1", "above 0"),
    ):
        refused = run(*QAT, "schedule.epochs=1", asked)
        assert refused["status"] == "failed" and said in refused["error"]
    refused = run("quant=dorefa", *QAT[2:], "schedule.epochs=1", "schedule.oscillation.freeze=0.02")
    assert (
        refused["status"] == "failed"
        and "conv2 (weight)" in refused["error"]
        and "transforms the weight" in refused["error"]
    )


def test_quantizer_parameters_have_a_rate_momentum_and_decay_of_their_own(run, tmp_path):
    """The schedule decides, independently of the weights; a rate of 0 leaves every scale where calibration put it."""
    own = ("schedule.quantizer.lr=0", "schedule.quantizer.momentum=0.5", "schedule.quantizer.weight_decay=0.003")
    metrics = run(*QAT, "schedule.epochs=1", *own)
    saved = torch.load(point(tmp_path, metrics) / "checkpoints" / "last.ckpt", weights_only=True)
    weights, scales = saved["optimizer_states"][0]["param_groups"]
    assert (scales["initial_lr"], scales["momentum"], scales["weight_decay"]) == (0, 0.5, 0.003)
    assert (weights["initial_lr"], weights["momentum"], weights["weight_decay"]) == (0.01, 0.9, 1e-4)
    learned, still = final_state(tmp_path, run(*QAT, "schedule.epochs=1")), saved["state_dict"]
    moved = [k for k in learned if k.endswith("quantizer.scale") and not torch.equal(learned[k], still[k])]
    assert len(moved) == len(scales["params"]) == 10


def test_a_start_from_searched_ranges_is_closer_than_the_papers(run, tmp_path):
    """At 2 bits, `2 E|x| / sqrt(QP)` starts some dB behind the range of least squared error, in every weight."""
    start = {}
    for name, init in (("mse", ()), ("paper", ("quant.weight.range=paper", "quant.input.range=paper"))):
        metrics = run(*QAT[:3], "trainer.limit_train_batches=1", "schedule.epochs=1", f"study={name}", *init)
        history = pd.read_csv(point(tmp_path, metrics) / "history.csv")
        inside = history[(history.step == 0) & ~history.layer.isin(["conv1", "fc"])]
        start[name] = inside.set_index(["layer", "site"]).sqnr
    ahead = start["mse"] - start["paper"]
    assert (ahead[:, "weight"] > 1).all() and ahead.mean() > 1
