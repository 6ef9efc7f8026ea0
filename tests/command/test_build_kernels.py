"""A sweep builds its kernels before it starts to count points."""

import logging
import time

import qexp_kernels
from qexp_kernels import build

from qexp.command.build_kernels import BuildKernels
from qexp.command.study_page import StudyPage


def slow_build(monkeypatch, seconds: float) -> list[str]:
    """Makes the build take some seconds and log its line; returns the requested kernels."""
    asked = []

    def load(which):
        asked.append(which)
        logging.getLogger(build.__name__).info("kernels: building them, about 9 s, once")
        time.sleep(seconds)
        raise qexp_kernels.KernelError("there is none")

    monkeypatch.setattr(qexp_kernels, "load", load)
    return asked


def test_the_build_counts_for_no_point_and_prints_its_line(compose, monkeypatch, capsys):
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir

    compose()  # registers what the configuration needs
    asked = slow_build(monkeypatch, 0.3)
    with initialize_config_dir(str(conf()), version_base="1.3"):
        config = hydra_compose("config", overrides=["kernels=cpp"], return_hydra_config=True)
        assert list(config.hydra.callbacks).index("kernels") < list(config.hydra.callbacks).index("study")
        BuildKernels().on_multirun_start(config)
        page = StudyPage()
        page.on_multirun_start(config)
        assert asked == ["cpp"] and time.monotonic() - page.remaining.began < 0.3
        assert capsys.readouterr().out == "kernels: building them, about 9 s, once\n"


def conf():
    from pathlib import Path

    return Path(__file__).parents[2] / "conf"
