"""Training in two steps: float weights under narrow inputs first, then the whole recipe; and one-bit recipes end to end."""

from __future__ import annotations

import pytest
import torch
from pytorch_lightning import Callback
from torch import nn

from qexp.layers import quantizers
from qexp.models.cifar_resnet import CifarResNet
from qexp.models.weights import save_weights
from qexp.recipe.plan import Entry, Plan, Source
from qexp.run import pipeline, stages, training
from qexp.run.settings import read

TWO = (
    "schedule=qat",
    "quant=bwn_lsq",
    "bits=w1a2",
    "schedule.two_step=0.34",
    "schedule.epochs=3",
    "trainer.limit_train_batches=4",
    "study=s",
)
SMALL = (
    "model=resnet20_bireal",
    "dataset=digits",
    "model.net.depth=8",
    "model.net.in_channels=1",
    "model.input_size=[1,8,8]",
    "model.groups=[layer1.0,layer2.0,layer3.0]",
    "trainer=cpu",
    "trainer.enable_progress_bar=false",
    "trainer.limit_train_batches=3",
    "kernels=reference",
    "max_samples=100",
    "n_calibrate=32",
    "bits=w1a1",
)


class Stop(Callback):
    """Kills a training at the start of its second epoch."""

    def on_train_epoch_start(self, trainer, pl_module):
        if trainer.current_epoch == 1:
            raise RuntimeError("the machine went down")


def test_the_first_step_has_float_weights_and_narrow_inputs(run, monkeypatch):
    seen, fit = [], training.fit

    def watched(module, *args, **options):
        seen.append({f"{n}.{s}": q.bits for n, s, q in quantizers(module.model)})
        assert isinstance(module.model.conv2.weight_quantizer, nn.Identity) == (len(seen) == 1)
        return fit(module, *args, **options)

    monkeypatch.setattr(training, "fit", watched)
    metrics = run(*TWO)
    assert metrics["status"] == "ok", metrics["error"]
    assert [s["bits"] for s in metrics["stages"]] == ["float weights", None]
    assert [s["epochs"] for s in metrics["stages"]] == [1, 2] and metrics["quant"] == "bwn_lsq + two steps 0.34"
    first, second = seen
    assert not any(key.endswith("weight") for key in first) and first["conv2.input"] == 2
    assert second["conv2.weight"] == 1 and second["conv1.weight"] == 8 and second["conv2.input"] == 2


def test_a_resumed_second_step_is_the_uninterrupted_one(run, tmp_path, monkeypatch):
    through, make_trainer, calls = run(*TWO, "study=through"), training.make_trainer, []

    def dying(settings, phase, folder, callbacks=None, **rest):
        fits = rest.get("max_epochs") is not None
        calls.extend([phase] * fits)
        return make_trainer(
            settings, phase, folder, [*(callbacks or []), *[Stop()] * (fits and len(calls) == 2)], **rest
        )

    with monkeypatch.context() as patched:
        patched.setattr(training, "make_trainer", dying)
        assert run(*TWO)["status"] == "failed" and len(calls) == 2 and "float weights" in calls[0]
    resumed = run(*TWO)
    states = [
        torch.load(tmp_path / "runs" / m["study"] / m["point"] / "checkpoints" / "last.ckpt", weights_only=True)[
            "state_dict"
        ]
        for m in (through, resumed)
    ]
    assert resumed["value"] == through["value"]
    assert all(torch.equal(value, states[1][key]) for key, value in states[0].items())


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        (["schedule.two_step=0.1"], "one whole epoch"),
        (["schedule.progressive=[4]"], "leave schedule.progressive"),
        (["layer_wbit=32", "ends_bit=32"], "the recipe quantizes none"),
    ],
)
def test_steps_that_cannot_be_are_refused(run, asked, said):
    refused = run(*TWO, *asked)
    assert refused["status"] == "failed" and said in refused["error"]


def test_without_it_a_training_is_what_it_was(compose):
    plan = Plan((Entry("conv", "weight", {}, 1, Source.WIDTH, "layer_wbit"),))
    one = read(compose("schedule=qat", "schedule.epochs=3")).schedule
    assert one.two_step is None and stages.stages(one, plan) == [stages.Stage(None, 3)]
    assert [s.epochs for s in stages.stages(read(compose("schedule=one_bit")).schedule, plan)] == [24, 36]


@pytest.mark.parametrize("quant", ["irnet", "recu", "adabin", "reactnet", "xnor_plus"])
def test_one_bit_recipes_run_from_a_plain_network_with_a_teacher(compose, tmp_path, quant):
    from qexp.models.digits_cnn import DigitsCNN

    torch.manual_seed(0)
    plain = CifarResNet(8)
    plain.conv1 = nn.Conv2d(1, 16, 3, padding=1, bias=False)
    save_weights(plain, tmp_path / "plain.safetensors")
    save_weights(DigitsCNN(width=8), tmp_path / "teacher.safetensors")
    metrics = pipeline.run(
        read(
            compose(
                *SMALL,
                f"quant={quant}",
                f"model.net.start={tmp_path / 'plain.safetensors'}",
                "model@schedule.distill.teacher=digits_cnn",
                "schedule.distill.teacher.net.width=8",
                f"schedule.distill.teacher.weights={tmp_path / 'teacher.safetensors'}",
                "schedule.distill.logits=0.9",
                "schedule.epochs=2",
                "schedule.two_step=0.5",
                f"runs_dir={tmp_path / 'runs'}",
            )
        )
    )
    assert metrics["status"] == "ok", metrics["error"]
    assert metrics["quant"] == f"{quant} + distilled from digits_cnn + two steps 0.5"


def test_a_network_of_signs_learns_the_digits(compose, tmp_path):
    """Where each sign sees both signs, one bit for weights and inputs is learned from random weights in six epochs."""
    metrics = pipeline.run(
        read(
            compose(
                *(o for o in SMALL if "limit_train" not in o and "max_samples" not in o),
                "quant=reactnet",
                "schedule.epochs=6",
                "schedule.two_step=0.34",
                f"runs_dir={tmp_path / 'runs'}",
            )
        )
    )
    assert metrics["status"] == "ok", metrics["error"]
    assert metrics["value"] > 60, "chance is 10; 77 when this was written"
