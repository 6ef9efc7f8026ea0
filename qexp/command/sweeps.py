"""A sweep's configurations, composed once each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from hydra.core.global_hydra import GlobalHydra
from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf

HELD = 64  # configurations that wait for their point; a megabyte each


class ComposeOnce(Callback):
    """Lets the points of a sweep run with the configurations that Hydra composed to check the sweep before its first point.

    Hydra composes each again when its turn comes, which takes a tenth of a second. Where points run in other processes they still do.
    """

    def __init__(self) -> None:
        self.checked: Checked | None = None

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        if not str(OmegaConf.select(config, "hydra.launcher._target_")).endswith("BasicLauncher"):
            return
        loader = GlobalHydra.instance().config_loader()
        loader.load_sweep_config = self.checked = Checked(loader.load_sweep_config)

    def on_job_start(self, config: DictConfig, **kwargs: Any) -> None:
        if self.checked is not None:
            self.checked.started(config)


class Checked:
    """Composes a configuration, or hands out the one that was composed of the same overrides before, once.

    The first to be handed out, or to run, ends the check: what is composed from then on is not held.

    Args:
        compose: `(master_config, sweep_overrides) -> configuration`.
        held: How many may wait.
    """

    def __init__(self, compose: Callable[[DictConfig, list[str]], DictConfig], held: int = HELD) -> None:
        self.compose, self.held, self.checking = compose, held, True
        self.waiting: dict[tuple[str, ...], DictConfig] = {}

    def __call__(self, master_config: DictConfig, sweep_overrides: Sequence[str]) -> DictConfig:
        asked = tuple(sweep_overrides)
        if asked in self.waiting:
            self.checking = False
            return self.waiting.pop(asked)
        made = self.compose(master_config, list(sweep_overrides))
        if self.checking and len(self.waiting) < self.held:
            self.waiting[asked] = made
        return made

    def started(self, config: DictConfig) -> None:
        """A point runs: the check is over, and its configuration is for no other, where a sweeper had nothing checked."""
        self.checking = False
        self.waiting = {asked: held for asked, held in self.waiting.items() if held is not config}
