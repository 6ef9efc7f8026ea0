"""APoT's weight normalisation is part of the method: without it, and with the paper's first clip, training at 3 bits fails."""

from __future__ import annotations

PUBLISHED = ("quant=apot", "bits=w3a3", "schedule=qat", "quant.weight.range=3.0")


def test_without_normalisation_a_digits_network_loses_much(run):
    steps = ("schedule.epochs=1", "trainer.limit_train_batches=20", "trainer.limit_val_batches=1")
    whole = run(*PUBLISHED, *steps, "study=s")
    without = run(*PUBLISHED, *steps, "study=s", "quant.weight.normalize=false")
    assert whole["status"] == without["status"] == "ok"
    assert whole["drop"] < 5 < 20 < without["drop"], (whole["drop"], without["drop"])
