"""Quantize a network and say what it costs: `python run.py --help`."""

import sys
from pathlib import Path

import hydra
from omegaconf import DictConfig

from qexp.choices import check_choices, check_runs_dir, key_maps_quoted, rules_added
from qexp.config import register
from qexp.errors import QexpError

register()


@hydra.main(version_base="1.3", config_path="conf", config_name="config")
def main(cfg: DictConfig) -> dict:
    from qexp.memory import settle
    from qexp.pipeline import run  # here, so that --help and --cfg answer at once

    settle()
    return run(cfg)


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
        from qexp.report.study import StudyPage

        sys.exit(StudyPage.interrupted())
