"""Quantize a network and report what it costs: `python run.py --help`."""

import logging
import sys
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from qexp.command.choices import check_choices, check_runs_dir, key_maps_quoted, rules_added
from qexp.command.chosen import named, tell
from qexp.command.root import register
from qexp.errors import QexpError

register()


@hydra.main(version_base="1.3", config_path="conf", config_name="config")
def main(cfg: DictConfig) -> dict:
    from qexp.run.pipeline import run  # imported here, so that --help and --cfg start fast
    from qexp.run.settings import read
    from qexp.system.allocator import settle

    settle()
    hydra_config = HydraConfig.get()
    tell(hydra_config)
    in_sweep = hydra_config.mode == RunMode.MULTIRUN
    try:
        settings = read(named(cfg, hydra_config.runtime.choices), in_sweep=in_sweep)
    except QexpError as mistake:
        if not in_sweep:
            sys.exit(str(mistake))
        logging.getLogger("qexp").error("%s", mistake)  # the sweep continues; a point of this name cannot exist
        return {"status": "failed", "error": f"QexpError: {mistake}"}
    return run(settings)


if __name__ == "__main__":
    try:
        sys.argv[1:] = key_maps_quoted(rules_added(sys.argv[1:]))
        check_choices(sys.argv[1:], Path(__file__).parent / "conf")
        check_runs_dir(sys.argv[1:])
    except QexpError as mistake:
        sys.exit(str(mistake))
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        from qexp.command.study_page import StudyPage

        sys.exit(StudyPage.interrupted())
