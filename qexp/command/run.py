"""A run or a sweep, from the words of the command line: `qexp quant=mse bits=w4a4`, `qexp -m quant=minmax,mse`."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Sequence

import hydra
from hydra._internal.hydra import Hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from qexp.command.choices import check_choices, check_runs_dir, key_maps_quoted, rules_added
from qexp.command.chosen import named, tell
from qexp.command.folders import CONF
from qexp.command.root import register
from qexp.errors import QexpError

register()


@hydra.main(version_base="1.3", config_path=str(CONF), config_name="config")
def point(cfg: DictConfig) -> dict:
    """Runs one point, which Hydra has composed."""
    from qexp.run import earlier, request  # imported here, so that --help and --cfg start fast
    from qexp.run.settings import read

    hydra_config = HydraConfig.get()
    if hydra_config.job.chdir:  # it would move the weights, plans and results that relative paths name
        os.chdir(hydra_config.runtime.cwd)
    tell(hydra_config)
    in_sweep = hydra_config.mode == RunMode.MULTIRUN
    try:
        settings = read(named(cfg, hydra_config.runtime.choices), in_sweep=in_sweep)
        request.check(settings)
    except QexpError as mistake:
        if not in_sweep:
            sys.exit(str(mistake))
        logging.getLogger("qexp").error("%s", mistake)  # the sweep continues; a point of this name cannot exist
        return {"status": "failed", "error": f"QexpError: {mistake}"}
    if (metrics := earlier.finished(settings)) is not None:
        return metrics
    from qexp.run.pipeline import run  # seconds to import, which a finished point does not need
    from qexp.system.allocator import settle

    settle()
    return run(settings)


def main(words: Sequence[str]) -> int:
    """Checks the words and runs what they ask for; returns the exit status."""
    try:
        words = key_maps_quoted(rules_added(words))
        check_choices(words, CONF)
        check_runs_dir(words)
    except QexpError as mistake:
        print(mistake, file=sys.stderr)
        return 1
    sys.argv[1:] = words  # Hydra reads them there
    if {"--help", "-h"} & set(words):  # Hydra takes a second to collect lists that our text of the help does not hold
        Hydra.list_all_config_groups = lambda *_: []
    try:
        point()
    except KeyboardInterrupt:
        from qexp.command.study_page import StudyPage

        return StudyPage.interrupted()
    return 0
