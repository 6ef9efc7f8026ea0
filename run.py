"""Quantize a network and say what it costs: `python run.py --help`."""

import sys

import hydra
from omegaconf import DictConfig

from qexp.config import register

register()


@hydra.main(version_base="1.3", config_path="conf", config_name="config")
def main(cfg: DictConfig) -> dict:
    from qexp.pipeline import run  # here, so that --help and --cfg answer at once

    return run(cfg)


if __name__ == "__main__":
    sys.exit(main())
