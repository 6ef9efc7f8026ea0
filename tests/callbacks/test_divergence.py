"""A learned scale that vanishes or is no number ends the training with layer and step; the last sound checkpoint stays."""

from __future__ import annotations

import pytest
import torch
from pytorch_lightning import Callback

from qexp.callbacks.divergence import Divergence
from qexp.errors import QexpError
from qexp.layers.quantized import quantizers
from qexp.quantizers.lsq import LSQ
from qexp.quantizers.tqt import TQT
from qexp.run import training

QAT = ("schedule=qat", "schedule.epochs=2", "trainer.limit_train_batches=4", "trainer.limit_val_batches=1", "bits=w4a4")


class Break(Callback):
    """Spoils one learned scale in the second epoch, in the step before its last."""

    def __init__(self, value: float) -> None:
        self.value = value

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        if trainer.global_step == 6:
            q = next(t[2] for t in quantizers(pl_module.model) if t[1] == "weight")
            (q.log2_t if isinstance(q, TQT) else q.scale).data.fill_(self.value)


@pytest.mark.parametrize(
    ("quant", "value"), [("lsq", torch.nan), ("lsq", torch.inf), ("tqt", torch.inf), ("tqt", torch.nan)]
)
def test_a_diverging_scale_stops_the_run_and_keeps_the_last_sound_checkpoint(run, tmp_path, monkeypatch, quant, value):
    make_trainer = training.make_trainer

    def breaking(settings, phase, folder, callbacks=None, **rest):
        return make_trainer(
            settings, phase, folder, [*(callbacks or []), *([Break(value)] if callbacks else [])], **rest
        )

    monkeypatch.setattr(training, "make_trainer", breaking)
    metrics = run(*QAT, f"quant={quant}", "schedule.quantizer.lr=0", "study=s")  # 0: it must not learn its way back
    assert metrics["status"] == "failed"
    assert "(weight): the training diverged: at optimizer step 7" in metrics["error"]
    assert "schedule.quantizer.lr" in metrics["error"]
    kept = torch.load(tmp_path / "runs" / "s" / metrics["point"] / "checkpoints" / "last.ckpt", weights_only=True)
    assert kept["global_step"] == 4
    assert all(torch.isfinite(t).all() for t in kept["state_dict"].values() if t.is_floating_point())


class Holder(torch.nn.Module):
    def __init__(self, **parts: torch.nn.Module) -> None:
        super().__init__()
        for name, part in parts.items():
            self.add_module(name, part)


def test_the_message_counts_values_and_tensors():
    good, bad, worse = (LSQ(4, (4,), signed=True) for _ in range(3))
    bad.name, worse.name = "conv1 (weight)", "conv2 (input)"
    watch = Divergence()
    watch.watched = [(q.name, q) for q in (good, bad, worse)]
    watch.check(7)
    for q in (bad, worse):
        q.scale.data.fill_(0.0)
    with pytest.raises(
        QexpError, match=r"conv1 \(weight\).*step 7, 1 of 1 learned scales, and of 1 more tensors vanished"
    ):
        watch.check(7)


def test_networks_without_learned_scales_are_not_watched():
    watch = Divergence()
    watch.on_train_start(None, Holder(conv=torch.nn.Conv2d(1, 1, 1)))
    assert not watch.watched
    watch.on_train_start(None, Holder(q=LSQ(4, (4,), signed=True)))
    assert len(watch.watched) == 1
