"""Threads and priority of a run: set as asked, refused where impossible, and no part of a point's name."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from qexp.errors import QexpError
from qexp.run import devices
from qexp.run.settings import TrainerOptions

TRAINER = {"_target_": "pytorch_lightning.Trainer"}


@pytest.mark.parametrize("given", [{"threads": 0}, {"threads": 1.5}, {"nice": 20}, {"nice": -1}, {"nice": "low"}])
def test_what_cannot_be_is_refused(given):
    key, value = next(iter(given.items()))
    with pytest.raises(QexpError, match=f"trainer.{key}={value}"):
        TrainerOptions.of(TRAINER | given)


def test_threads_are_set_for_a_point_and_no_longer():
    before = torch.get_num_threads()
    try:
        devices.share_machine(TrainerOptions.of(TRAINER | {"threads": before + 1}))
        assert torch.get_num_threads() == before + 1
    finally:
        devices.share_machine(TrainerOptions.of(TRAINER))
    assert torch.get_num_threads() == before


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="threads have no priorities of their own elsewhere")
def test_a_run_in_the_background_stands_back_with_all_its_threads():
    code = """
import os, threading
from qexp.run import devices
from qexp.run.settings import TrainerOptions
threading.Thread(target=threading.Event().wait, daemon=True).start()
for nice in (7, 3, 0):
    devices.share_machine(TrainerOptions.of({"_target_": "pytorch_lightning.Trainer", "nice": nice}))
    print(*{os.getpriority(os.PRIO_PROCESS, int(t)) for t in os.listdir("/proc/self/task")})
"""
    before = os.getpriority(os.PRIO_PROCESS, 0)
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert said.split() == [str(max(before, 7))] * 3


def test_they_change_neither_the_result_nor_the_name(run):
    plain = run("study=a", "max_samples=40")
    shared = run("study=b", "max_samples=40", "trainer.threads=1", "trainer.nice=0")
    assert (plain["point"], plain["value"]) == (shared["point"], shared["value"])
