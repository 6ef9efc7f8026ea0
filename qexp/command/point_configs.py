"""Composes the configurations of a sweep's points: the files that several points choose are read and merged once."""

from __future__ import annotations

import pickle
import zlib
from collections.abc import Sequence

from hydra._internal.config_loader_impl import ConfigLoaderImpl, get_overrides_dirname
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from omegaconf import DictConfig, OmegaConf


class PointConfigs:
    """Composes points as Hydra's `load_sweep_config` does, in a fraction of its time.

    Hydra reads and merges all files anew for each point, three times: in two checks before a sweep and in the run. A point's choices of
    files (`quant=mse`) determine the merged files; its values (`layer_wbit=4`) only change them afterwards. So a composition is kept
    for each set of choices, and the values of a point are set in a copy of it. Where this fails, Hydra composes the point and its
    error, if any, is raised.

    Args:
        loader: Hydra's loader.
    """

    def __init__(self, loader: ConfigLoaderImpl) -> None:
        self._loader, self._compose = loader, loader.load_sweep_config
        self._kept: dict[tuple[str, ...], bytes] = {}
        self._groups: dict[str, bool] = {}

    @classmethod
    def install(cls, loader: ConfigLoaderImpl) -> None:
        """Makes a loader compose points in this way; a loader that does so already stays as it is."""
        if isinstance(loader, ConfigLoaderImpl) and "load_sweep_config" not in vars(loader):
            loader.load_sweep_config = cls(loader).load

    def load(self, master_config: DictConfig, sweep_overrides: Sequence[str]) -> DictConfig:
        """Returns the configuration of a point of a sweep.

        Args:
            master_config: The configuration of the sweep.
            sweep_overrides: The point's words.
        """
        words = list(sweep_overrides)
        try:
            config = self._from_kept(master_config, words)
        except Exception:  # Hydra's composition, below, raises the error with its reason
            config = None
        return self._compose(master_config, words) if config is None else config

    def _from_kept(self, master: DictConfig, words: list[str]) -> DictConfig | None:
        """Returns a point's configuration from a kept composition; None where the order of its words may matter."""
        parsed = OverridesParser.create().parse_overrides(words)
        chosen = [o for o in parsed if o.is_hydra_override() or self._is_group(master, o.key_or_group)]
        if any(isinstance(o.value(), dict) for o in chosen):  # a value in the place of a choice
            return None
        key = tuple(str(o.input_line) for o in chosen)
        if key not in self._kept:
            self._kept[key] = zlib.compress(pickle.dumps(self._compose(master, list(key))), 1)
        config = pickle.loads(zlib.decompress(self._kept[key]))
        ConfigLoaderImpl._apply_overrides_to_config([o for o in parsed if o not in chosen], config)
        _note(config, [o for o in parsed if not o.is_hydra_override()])
        OmegaConf.copy_cache(from_config=master, to_config=config)
        return config

    def _is_group(self, master: DictConfig, key: str) -> bool:
        """Returns whether a key is a folder of configuration files."""
        if key not in self._groups:
            overrides = OmegaConf.to_container(master.hydra.overrides.hydra)  # they may name further folders
            name = master.hydra.job.config_name
            self._groups[key] = bool(self._loader.get_group_options(key, None, name, overrides))
        return self._groups[key]


def _note(config: DictConfig, overrides: Sequence[Override]) -> None:
    """Records the words of a point, as Hydra does, for callbacks and the names of folders."""
    job, form = config.hydra.job, config.hydra.job.config.override_dirname
    config.hydra.overrides.task = [o.input_line for o in overrides]
    job.override_dirname = get_overrides_dirname(list(overrides), form.exclude_keys, form.item_sep, form.kv_sep)
