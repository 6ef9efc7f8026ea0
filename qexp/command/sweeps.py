"""Counts and checks the points of a sweep before the first one runs."""

from __future__ import annotations

import pickle
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from hydra.experimental.callback import Callback
from hydra.utils import get_class
from omegaconf import DictConfig, OmegaConf, open_dict, read_write

from qexp.command.chosen import named
from qexp.command.point_configs import PointConfigs
from qexp.errors import QexpError

if TYPE_CHECKING:
    from qexp.run.settings import Settings

SHOWN = 5  # greatest number of refused points that the error names


def points(config: DictConfig) -> list[list[str]] | None:
    """Returns the overrides of each point of a sweep, in order; None where a sweeper chooses points while it runs.

    Raises:
        HydraException: The command line is not a valid sweep; the sweeper raises the same error.
    """
    sweeper = str(OmegaConf.select(config, "hydra.sweeper._target_"))
    if not sweeper.endswith(".BasicSweeper"):
        return None
    params = config.hydra.sweeper.get("params") or {}
    # Overrides of the command line come last, so that a single value there replaces a preset's sweep.
    # The point itself resolves any `${...}`.
    given = OmegaConf.to_container(config.hydra.overrides.task, resolve=False)
    asked = [*(f"{key}={value}" for key, value in params.items()), *given]
    return get_class(sweeper).split_arguments(OverridesParser.create().parse_overrides(asked), None)[0]


def points_of(config: DictConfig) -> int | None:
    """Returns the number of points of a sweep; None where a sweeper chooses points while it runs."""
    every = points(config)
    return None if every is None else len(every)


class CheckPoints(Callback):
    """Reads the settings of every point of a sweep before the first one runs: `-m seed=0,-1` is refused with no point run.

    The check covers what the configuration alone determines: types, bounds, choices, references to keys that do not exist. Composing a
    point takes hundredths of a second. A sweeper that chooses points while it runs (Optuna's) has no points to check yet.
    """

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        PointConfigs.install(GlobalHydra.instance().config_loader())
        try:
            every = points(config) or []
            refused = list(_refused(config, every))
        except HydraException:  # a mistake in the command line, for which the sweeper raises the error
            return
        if refused:  # Hydra turns exceptions of callbacks into warnings
            sys.exit("\n".join(_told(refused, len(every))))


def all_finished(config: DictConfig) -> bool:
    """Returns whether every point of a sweep is known to have finished earlier; never imports torch."""
    from qexp.run import earlier  # imported here, so that --help and --cfg start fast

    every = points(config)
    return bool(every) and all(
        not isinstance(asked, QexpError) and earlier.found(asked) is not None for _, asked in _requests(config, every)
    )


def _refused(config: DictConfig, every: Sequence[Sequence[str]]) -> Iterator[tuple[Sequence[str], QexpError]]:
    """Yields the points whose settings cannot be read, each as its error and the overrides in which it differs."""
    shared = set(every[0]).intersection(*every) if every else set()
    for overrides, asked in _requests(config, every):
        if isinstance(asked, QexpError):
            yield [o for o in overrides if o not in shared], asked


def _requests(
    config: DictConfig, every: Sequence[Sequence[str]]
) -> Iterator[tuple[Sequence[str], Settings | QexpError]]:
    """Yields the overrides of each point with its settings, or with the error of settings that are not allowed."""
    from qexp.run import request  # imported here, so that --help and --cfg start fast
    from qexp.run.settings import read

    loader = GlobalHydra.instance().config_loader()
    for number, overrides in enumerate(every):
        composed = loader.load_sweep_config(config, list(overrides))
        with open_dict(composed):
            composed.hydra.job.id = composed.hydra.job.num = number
        with _running(composed):
            try:
                asked = read(named(_task(composed), composed.hydra.runtime.choices), in_sweep=True)
                request.check(asked)
            except QexpError as error:
                asked = error
        yield overrides, asked


def _told(refused: Sequence[tuple[Sequence[str], QexpError]], total: int) -> Iterator[str]:
    """Yields the lines that name the points that may not run."""
    count = len(refused)
    yield f"{count} of {total} points {'asks' if count == 1 else 'ask'} for what is not allowed; none was run"
    for overrides, error in refused[:SHOWN]:
        yield f"  {' '.join([*overrides, ''])}-> {error}" if overrides else f"  {error}"
    if count > SHOWN:
        yield f"  and {count - SHOWN} more"


def _task(composed: DictConfig) -> DictConfig:
    """Returns a configuration in the form of a run: without Hydra's own keys."""
    config = pickle.loads(pickle.dumps(composed))  # a third of the time of a deep copy
    with read_write(config), open_dict(config):
        del config["hydra"]
    return config


@contextmanager
def _running(composed: DictConfig) -> Iterator[None]:
    """Makes `${hydra:...}` read, inside the block, a point's configuration, as it does when the point runs."""
    held = HydraConfig.instance()
    before = held.cfg
    held.cfg = composed  # not `set_config`, which copies it
    try:
        yield
    finally:
        held.cfg = before
