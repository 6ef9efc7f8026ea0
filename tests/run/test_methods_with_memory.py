"""Methods that remember: what their training does to the memory, once a step, and how a resumed training goes on with it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from pytorch_lightning import Callback

from qexp.layers import quantizers
from qexp.quantizers.hysteresis import Hysteresis
from qexp.run import training

STEPS = 4
QAT = ("schedule=qat", "schedule.epochs=2", f"trainer.limit_train_batches={STEPS}", "trainer.limit_val_batches=1")
REMEMBER = {
    "normed": ("quant=tqt", "bits=w4a4"),
    "one_bit": ("quant=one_bit", "bits=w1a2"),
    "legacy": ("quant=hysteresis", "bits=w1a4", "quant.weight.rule=legacy", "schedule.optimizer.lr=0.3"),
    "surrogate": ("quant=sigmoid_surrogate", "bits=w4a4"),
    "gradients": ("quant=dorefa_gradients", "bits=w4a4", "quant.grad_bits=6"),
}


class Stop(Callback):
    """Kills a training after its first epoch."""

    def on_train_epoch_start(self, trainer, pl_module):
        if trainer.current_epoch == 1:
            raise RuntimeError("the machine went down")


def last(tmp_path: Path, study: str, metrics: dict) -> dict[str, torch.Tensor]:
    path = tmp_path / "runs" / study / metrics["point"] / "checkpoints" / "last.ckpt"
    return torch.load(path, weights_only=True)["state_dict"]


@pytest.mark.parametrize("method", REMEMBER)
def test_a_resumed_training_is_the_uninterrupted_one(run, tmp_path, monkeypatch, method):
    options = (*QAT, *REMEMBER[method])
    through = run(*options, "study=through")
    assert through["status"] == "ok", through["error"]
    make_trainer = training.make_trainer

    def dying(settings, phase, folder, callbacks=None, **rest):
        return make_trainer(settings, phase, folder, [*(callbacks or []), Stop()], **rest)

    with monkeypatch.context() as patched:
        patched.setattr(training, "make_trainer", dying)
        assert "the machine went down" in run(*options, "study=s")["error"]
    resumed = run(*options, "study=s")
    assert resumed["status"] == "ok", resumed["error"]
    whole, again = last(tmp_path, "through", through), last(tmp_path, "s", resumed)
    assert whole.keys() == again.keys()
    for key, value in whole.items():
        assert torch.equal(value, again[key]), key
    assert resumed["value"] == through["value"]
    if method == "surrogate":
        sharp = [v for k, v in again.items() if k.endswith("quantizer.sharpness")]
        assert sharp and all(float(v) == 5.0 for v in sharp), "annealed to its end over both epochs"
    if method == "gradients":
        draws = [v for k, v in again.items() if k.endswith("grad_output_quantizer.draws")]
        assert draws and {int(v) for v in draws} == {2 * STEPS}, "one draw a backward pass, none in evaluation"
    if method in ("one_bit", "legacy"):
        signs = torch.cat([v.flatten() for k, v in again.items() if k.endswith("weight_quantizer.state")])
        assert resumed["non_binary_weights"] == int((signs.abs() != 1).sum())
        assert (resumed["non_binary_weights_most"] > 0) == (method == "legacy")


def test_the_memory_moves_once_an_optimizer_step_whatever_is_accumulated(run, monkeypatch):
    calls: dict[int, int] = {}
    step = Hysteresis.on_optimizer_step

    def counted(self, latent):
        calls[id(self)] = calls.get(id(self), 0) + 1
        step(self, latent)
        assert int(self.non_binary) == 0, "strictly 1-bit at every step"

    monkeypatch.setattr(Hysteresis, "on_optimizer_step", counted)
    metrics = run(*QAT, *REMEMBER["one_bit"], "+trainer.accumulate_grad_batches=2")
    assert metrics["status"] == "ok", metrics["error"]
    assert set(calls.values()) == {2 * STEPS // 2} and len(calls) == 3


def test_latents_decay_as_the_method_says_and_the_clip_moves_as_published(run, monkeypatch):
    seen = {}
    fit = training.fit

    def watched(module, *args):
        seconds = fit(module, *args)
        seen["groups"] = module.trainer.optimizers[0].param_groups
        seen["latent"] = {
            id(module.model.get_submodule(n).weight)
            for n, site, q in quantizers(module.model)
            if site == "weight" and isinstance(q, Hysteresis)
        }
        return seconds

    monkeypatch.setattr(training, "fit", watched)
    assert run(*QAT, *REMEMBER["one_bit"])["status"] == "ok"
    held = next(g for g in seen["groups"] if {id(p) for p in g["params"]} == seen["latent"])
    assert held["weight_decay"] == 0 and seen["groups"][0]["weight_decay"] == 1e-4 and len(seen["latent"]) == 3
    assert (
        run(*QAT, "quant=sources/quantized_resnet/pact_in_step", "bits=w4a4", "schedule.scheduler=null")["status"]
        == "ok"
    )
    clips = seen["groups"][-1]
    assert (clips["lr"], clips["momentum"], clips["weight_decay"]) == (0.01, 0.0, 2e-4)
    assert all(p.ndim == 0 for p in clips["params"])


def test_what_is_not_made_for_a_width_says_so(run):
    metrics = run("quant=bwn", "bits=w4a4", "schedule.epochs=1")
    assert metrics["status"] == "failed"
    assert "conv2 (weight): BWN: bits=4; allowed are 1..1" in metrics["error"]
