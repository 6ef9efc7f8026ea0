"""Training with quantizers: it runs, it learns the scales, and a resumed run is the uninterrupted one."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest
import torch
from pytorch_lightning import Callback
from safetensors.torch import load_file

from qexp.layers import quantizers
from qexp.run import pipeline, training

QAT = ("schedule=qat", "study=s", "bits=w4a4", "trainer.limit_train_batches=6")


def checkpoint(tmp_path: Path, metrics: dict, name: str = "last") -> dict:
    path = tmp_path / "runs" / "s" / metrics["point"] / "checkpoints" / f"{name}.ckpt"
    return torch.load(path, weights_only=True)


@pytest.mark.parametrize("quant", ["lsq", "pact", "dorefa", "minmax"])
def test_each_method_trains(run, tmp_path, quant):
    metrics = run(*QAT, f"quant={quant}", "schedule.epochs=1")
    assert metrics["status"] == "ok", metrics["error"]
    assert metrics["value"] > 30 and metrics["seconds_train"] > 0 and metrics["bn"] == "keep"
    state = checkpoint(tmp_path, metrics)["state_dict"]
    assert any("_quantizer.ready" in key for key in state), "quantizer state is in the checkpoint"
    curves = pd.read_csv(tmp_path / "runs" / "s" / metrics["point"] / "curves.csv")
    assert {"train_top1", "val_top1", "val_loss"} <= set(curves.name)


@pytest.mark.parametrize(("quant", "learned"), [("lsq", ".scale"), ("pact", ".alpha")])
def test_scales_and_clips_learn_in_a_group_of_their_own(run, tmp_path, monkeypatch, quant, learned):
    seen = {}
    fit = training.fit

    def watched(module, *args, **options):
        before = {n: p.detach().clone() for n, p in module.named_parameters()}
        seconds = fit(module, *args, **options)
        seen.update({n: (before[n], p.detach().clone()) for n, p in module.named_parameters()})
        seen["decay"] = [g["weight_decay"] for g in module.trainer.optimizers[0].param_groups]
        seen["sizes"] = [len(g["params"]) for g in module.trainer.optimizers[0].param_groups]
        return seconds

    monkeypatch.setattr(training, "fit", watched)
    metrics = run(*QAT, f"quant={quant}", "schedule.epochs=1")
    assert metrics["status"] == "ok", metrics["error"]
    moved = {n: not torch.equal(*pair) for n, pair in seen.items() if n.endswith(learned) and "_quantizer" in n}
    assert moved and all(moved.values()) and all((seen[n][1] > 0).all() for n in moved)
    assert len(moved) in seen["sizes"], "the learned ranges are one parameter group"
    assert seen["decay"][seen["sizes"].index(len(moved))] == (2e-4 if quant == "pact" else 0.0)


class Stop(Callback):
    """Kills a training after its first epoch."""

    def on_train_epoch_start(self, trainer, pl_module):
        if trainer.current_epoch == 1:
            raise RuntimeError("the machine went down")


@pytest.mark.parametrize(
    "options",
    [
        *(["quant=lsq"], ["quant=pact"], ["quant=dorefa"]),
        *(["quant=minmax", "+quant.input.rounding=stochastic"], ["quant=gemmlowp", "+quant.weight.noise=uniform"]),
    ],
    ids=["lsq", "pact", "dorefa", "stochastic rounding", "noise"],
)
def test_two_epochs_are_one_and_one_resumed(run, tmp_path, monkeypatch, options):
    """Bit for bit: weights, scales, optimizer, schedule and result; the quantizers' state with them, and what they draw."""
    options = (*QAT, *options, "schedule.epochs=2")
    through = run(*options, "study=through")
    assert through["status"] == "ok", through["error"]
    make_trainer = training.make_trainer

    def dying(settings, phase, folder, callbacks=None, **rest):
        return make_trainer(settings, phase, folder, [*(callbacks or []), Stop()], **rest)

    with monkeypatch.context() as patched:
        patched.setattr(training, "make_trainer", dying)
        killed = run(*options, "study=s")
    assert killed["status"] == "failed" and "the machine went down" in killed["error"]
    half = checkpoint(tmp_path, killed)
    assert half["epoch"] == 0 and half["global_step"] == 6
    resumed = run(*options, "study=s")
    assert resumed["status"] == "ok", resumed["error"]
    assert resumed["value"] == through["value"]
    whole = torch.load(
        tmp_path / "runs" / "through" / through["point"] / "checkpoints" / "last.ckpt", weights_only=True
    )
    again = checkpoint(tmp_path, resumed)
    assert again["global_step"] == whole["global_step"] == 12
    assert whole["state_dict"].keys() == again["state_dict"].keys()
    for key, value in whole["state_dict"].items():
        assert torch.equal(value, again["state_dict"][key]), key
    for a, b in zip(whole["optimizer_states"][0]["state"].values(), again["optimizer_states"][0]["state"].values()):
        assert torch.equal(a["momentum_buffer"], b["momentum_buffer"])
    assert whole["lr_schedulers"] == again["lr_schedulers"]
    log = pd.read_csv(tmp_path / "runs" / "s" / resumed["point"] / "curves.csv")
    assert sorted(log[log.name == "val_top1"].epoch) == [0, 1], "the curve goes on where it stopped"


@pytest.mark.parametrize(
    "options", [[], ["schedule.ema=0.9"], ["schedule.progressive=8"]], ids=["one", "averaged", "stages"]
)
def test_a_run_killed_between_training_and_evaluation_says_what_its_training_came_to(run, monkeypatch, options):
    """Then nothing is left to train: the scores of its last epoch come from the checkpoint."""
    options = (*QAT, "quant=lsq", "schedule.epochs=2", *options)
    through = run(*options, "study=through")
    assert through["status"] == "ok", through["error"]
    evaluate = training.evaluate

    def dying(model, data, settings, phase, *rest):
        if phase != "float":
            raise RuntimeError("the machine went down")
        return evaluate(model, data, settings, phase, *rest)

    with monkeypatch.context() as patched:
        patched.setattr(training, "evaluate", dying)
        killed = run(*options)
    assert killed["status"] == "failed" and "the machine went down" in killed["error"]
    resumed = run(*options)
    aside = {"study", "peak_mb", *(key for key in through if key.startswith("seconds_"))}

    def lasting(row: dict) -> dict:
        stages = [{k: v for k, v in stage.items() if k != "seconds"} for stage in row.get("stages", [])]
        return {k: v for k, v in row.items() if k not in aside} | {"stages": stages}

    assert lasting(resumed) == lasting(through) and resumed["train_value"] > 0


class Clock(Callback):
    """A clock that an epoch takes a minute of, and that nothing else moves."""

    now = 0.0

    def on_train_epoch_end(self, trainer, pl_module):
        self.now += 60


@pytest.mark.parametrize("saved", [True, False], ids=["as saved", "of a checkpoint without the number"])
def test_the_seconds_of_a_resumed_training_are_those_of_all_its_parts(run, tmp_path, monkeypatch, saved):
    options, clock, make_trainer = (*QAT, "quant=lsq", "schedule.epochs=2"), Clock(), training.make_trainer

    def with_clock(*others):
        def made(settings, phase, folder, callbacks=None, **rest):
            return make_trainer(settings, phase, folder, [*(callbacks or []), clock, *others], **rest)

        monkeypatch.setattr(training, "make_trainer", made)

    monkeypatch.setattr(training.time, "perf_counter", lambda: clock.now)
    with_clock(Stop())
    killed = run(*options)
    assert killed["status"] == "failed" and "the machine went down" in killed["error"]
    if not saved:
        state = checkpoint(tmp_path, killed)
        assert state["trained"].pop("seconds") == 60
        torch.save(state, tmp_path / "runs" / "s" / killed["point"] / "checkpoints" / "last.ckpt")
    with_clock()
    resumed = run(*options)
    assert resumed["status"] == "ok", resumed["error"]
    assert resumed["seconds_train"] == (120 if saved else 60)


def test_forcing_a_point_trains_anew(run):
    options = (*QAT, "quant=lsq", "schedule.epochs=1")
    first = run(*options)
    again = run(*options, "force=true")
    assert again["status"] == "ok" and again["value"] == first["value"]
    assert again["seconds_train"] > 0.2 * first["seconds_train"], "the old checkpoint was not taken for the result"


def test_batch_norms_can_be_frozen(run, monkeypatch):
    seen = {}
    evaluate = training.evaluate

    def watched(model, *args):
        seen.setdefault("runs", []).append({n: b.clone() for n, b in model.named_buffers() if "running_mean" in n})
        return evaluate(model, *args)

    monkeypatch.setattr(training, "evaluate", watched)
    metrics = run(*QAT, "quant=lsq", "schedule.epochs=1", "bn=freeze")
    assert metrics["status"] == "ok", metrics["error"]
    before, after = seen["runs"]
    assert before and all(torch.equal(after[n], b) for n, b in before.items())


def test_evaluation_uses_every_quantizer(run, monkeypatch):
    """What is scored is the quantized network: the quantizers run in evaluation, weights once."""
    counts: dict[str, int] = {}
    evaluate = training.evaluate

    def watched(model, *args):
        counts.clear()
        for name, site, q in quantizers(model):

            def count(_, args, __, key=f"{name}.{site}"):
                if (
                    key.endswith("weight") or len(args[0]) == 50
                ):  # a batch: evaluation also finds the ReLUs that a clamp makes redundant
                    counts[key] = counts.get(key, 0) + 1

            q.register_forward_hook(count)
        return evaluate(model, *args)

    monkeypatch.setattr(training, "evaluate", watched)
    monkeypatch.setattr(pipeline.outcome, "write", lambda *_: None)
    run("study=s", "bits=w4a4", "dataset.data.eval_batch_size=50", "max_samples=150")
    assert {k for k in counts if k.endswith("weight")} == {
        f"{n}.weight" for n in ("conv1", "conv2", "conv3", "conv4", "fc")
    }
    assert all(n == 1 for k, n in counts.items() if k.endswith("weight")) and counts["conv2.input"] == 4, (
        "three batches; the first is also computed without the shortcuts of evaluation"
    )


@pytest.mark.parametrize("evaluate", ["float", "codes"])
def test_training_in_bfloat16_keeps_scales_in_float32(run, tmp_path, evaluate):
    short = ("schedule.epochs=1", "+trainer.limit_train_batches=3")
    metrics = run("quant=lsq", "bits=w4a4", *short, "trainer.precision=bf16-mixed", f"evaluate={evaluate}")
    assert metrics["status"] == "ok" and 0 <= metrics["value"] <= 100
    assert metrics["point"] != run("quant=lsq", "bits=w4a4", *short)["point"]
    saved = load_file(next((tmp_path / "runs").glob(f"*/{metrics['point']}/state.safetensors")))
    floating = [t for t in saved.values() if t.is_floating_point()]
    assert len(floating) > 4 and {t.dtype for t in floating} <= {torch.float32, torch.float64}
