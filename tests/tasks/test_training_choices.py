"""Optimizers and schedules of the rate: choices of their own that take the place of the schedule's, whichever that is."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from qexp.command.choices import check_choices
from qexp.errors import QexpError
from qexp.run import pipeline
from qexp.run.settings import read
from qexp.system.objects import make
from qexp.tasks.schedules import cosine, exponential, onecycle, steps

SCHEDULES = ("float", "float_adamw", "ptq", "qat", "qat_scratch")


def rates(make, total: int, **options) -> list[float]:
    """Returns the rate at every step, the optimizer's own being 1."""
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    schedule = make(optimizer, total, **options)
    seen = []
    for _ in range(total):
        seen.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    return seen


def test_steps_fall_at_whole_epochs():
    for epochs, per_epoch in ((200, 391), (10, 7)):
        seen = rates(steps, epochs * per_epoch, at=(0.3, 0.6, 0.9))
        falls = [i / per_epoch for i in range(1, len(seen)) if seen[i] != seen[i - 1]]
        assert falls == [0.3 * epochs, 0.6 * epochs, 0.9 * epochs]
        assert seen[-1] == pytest.approx(1e-3)


def test_exponential_is_that_of_torch_by_epoch():
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    theirs = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.97)
    ours = rates(exponential, 60, gamma=0.97, epochs=12)
    for epoch in range(12):
        assert ours[5 * epoch : 5 * epoch + 5] == pytest.approx([theirs.get_last_lr()[0]] * 5)
        optimizer.step()
        theirs.step()


def test_onecycle_is_that_of_torch():
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1, momentum=0.9)
    theirs = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1.0, total_steps=50, cycle_momentum=False)
    for ours in rates(onecycle, 50):
        assert ours == pytest.approx(theirs.get_last_lr()[0], rel=1e-6)
        optimizer.step()
        theirs.step() if theirs.last_epoch < 49 else None


def test_a_cosine_ends_at_its_share():
    assert rates(cosine, 1000, final=0.1)[-1] == pytest.approx(0.1, abs=1e-4)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize(("optimizer", "scheduler"), [("sgd", "steps"), ("adam", "exponential"), ("adamw", "onecycle")])
def test_every_choice_goes_with_every_schedule(compose, schedule, optimizer, scheduler):
    asked = read(compose(f"schedule={schedule}", f"optimizer={optimizer}", f"scheduler={scheduler}"))
    trained = asked.schedule.pretrain if schedule == "ptq" else asked.schedule
    made = make(trained.optimizer)([{"params": [nn.Parameter(torch.zeros(2))]}])
    assert type(made).__name__.lower() == optimizer
    assert made.defaults["lr"] == (1e-3 if optimizer != "sgd" else made.defaults["lr"]) > 0
    assert make(trained.scheduler)(made, 20).get_last_lr()[0] > 0
    if trained.quantizer:  # scales and clips follow the optimizer that is chosen
        assert trained.quantizer["lr"] == trained.optimizer["lr"] and trained.quantizer["momentum"] in (0.0, 0.9)
    if scheduler == "exponential":
        assert trained.scheduler["epochs"] == trained.epochs > 0
    assert asked.resolved["optimizer"] is None and asked.resolved["scheduler"] is None


def test_a_choice_is_the_same_point_as_its_options_spelled_out(compose):
    from qexp.run.naming import point_hash

    chosen = compose("quant=lsq", "optimizer=adam", "optimizer.lr=0.002", "optimizer.betas=[0.5,0.999]")
    spelled = compose("quant=lsq")
    spelled.schedule.optimizer = {
        "_target_": "torch.optim.Adam",
        "_partial_": True,
        "lr": 0.002,
        "betas": [0.5, 0.999],
        "weight_decay": 0.0,
    }
    assert point_hash(read(chosen), {}) == point_hash(read(spelled), {}) != point_hash(read(compose("quant=lsq")), {})


def test_a_network_is_trained_with_what_is_chosen(run):
    few = ("trainer.limit_train_batches=2", "schedule.epochs=1")
    metrics = run("quant=pact", "bits=w4a4", "optimizer=adam", "scheduler=steps", "study=s", *few)
    assert metrics["status"] == "ok", metrics["error"]
    other = run("quant=pact", "bits=w4a4", "study=s", *few)
    assert other["point"] != metrics["point"]


def test_the_option_that_would_do_nothing_is_refused():
    from tests.command.test_choices import CONF

    with pytest.raises(QexpError, match=r"schedule.optimizer.lr: optimizer=adam .*; set optimizer.lr"):
        check_choices(["optimizer=adam", "schedule.optimizer.lr=1"], CONF)
    with pytest.raises(QexpError, match=r"scheduler has no choice 'step' \(did you mean 'steps'"):
        check_choices(["scheduler=step"], CONF)
    check_choices(["optimizer=adam", "optimizer.lr=1e-4", "schedule.epochs=2"], CONF)


def test_another_class_with_the_options_of_the_one_before_says_what_to_do(compose, tmp_path):
    metrics = pipeline.run(
        read(
            compose(
                *("quant=lsq", "bits=w4a4", "trainer=cpu", "trainer.enable_progress_bar=false", "kernels=reference"),
                *(
                    "debug=fast",
                    "schedule=qat_scratch",
                    "schedule.optimizer._target_=torch.optim.Adam",
                    f"runs_dir={tmp_path}",
                ),
            )
        )
    )
    assert metrics["status"] == "failed"
    assert "Adam cannot be made" in metrics["error"] and "optimizer=sgd, adam or adamw" in metrics["error"]


def test_recipes_called_the_sources_train_as_they_do(compose):
    asked = read(compose("experiment=one_bit"))
    sgd, course = asked.schedule.optimizer, asked.schedule.scheduler
    assert (
        asked.network.net["shortcut"] == "B" and asked.data.module["batch_size"] == 128 and asked.schedule.epochs == 200
    )
    assert [sgd[key] for key in ("_target_", "lr", "momentum", "nesterov", "weight_decay")] == [
        "torch.optim.SGD",
        0.1,
        0.9,
        False,
        0,
    ]
    assert course["_target_"].endswith(".steps") and course["at"] == [0.3, 0.6, 0.9] and course["gamma"] == 0.1
    for name in ("dorefa_pact_toynet", "toynet_cfg1s", "mobilenetv2_cfg1s"):
        method = ["quant=placed/toynet/mpact"] if name == "dorefa_pact_toynet" else []
        schedule = read(compose(f"experiment={name}", *method)).schedule
        sgd, course = schedule.optimizer, schedule.scheduler
        assert [sgd[key] for key in ("lr", "momentum", "nesterov", "weight_decay")] == [0.01, 0.9, False, 5e-4]
        assert schedule.epochs == 300 and (course["warmup"], course["final"]) == (0.0, 0.1)
        assert schedule.quantizer["weight_decay"] == 9e-4


def test_every_row_of_pact_quantization_is_reached_by_its_study(compose):
    """The published rows, by network, method and bit lists, against what the sweeps of the study run."""
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir
    from omegaconf import OmegaConf

    from experiments.published import read_targets
    from tests.command.test_choices import CONF, ROOT

    compose("seed=0")  # registers the schema
    reached = set()
    for name in ("dorefa_pact", "dorefa_pact_mobilenet", "dorefa_pact_toynet"):
        with initialize_config_dir(str(CONF), version_base="1.3"):
            params = hydra_compose("config", [f"experiment={name}"], return_hydra_config=True).hydra.sweeper.params
        for quant in params.quant.split(","):
            for bits in params.bits.split(","):
                listed = OmegaConf.load(CONF / "bits" / f"{bits}.yaml")
                name = OmegaConf.load(CONF / "quant" / f"{quant}.yaml").name
                reached.add((name, *(str(OmegaConf.to_container(listed)[k]) for k in ("layer_wbit", "layer_abit"))))
    targets = read_targets(ROOT / "experiments" / "dorefa_pact" / "targets.csv")
    wanted = {
        (row.quant, row.wbit.replace("...", "'...'"), row.abit.replace("...", "'...'")) for row in targets.itertuples()
    }
    assert wanted <= reached, wanted - reached
