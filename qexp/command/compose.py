"""Composes a configuration as the command line does, as plain values for Python code."""

from __future__ import annotations

from collections.abc import Sequence

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException
from omegaconf import open_dict

from qexp.command.choices import check_choices, key_maps_quoted, rules_added
from qexp.command.chosen import named
from qexp.command.folders import CONF
from qexp.command.root import register
from qexp.errors import QexpError
from qexp.run.settings import Settings, read


def settings_of(overrides: Sequence[str]) -> Settings:
    """Returns the settings that a command line would give.

    Args:
        overrides: `GROUP=CHOICE` and `KEY=VALUE`, as on the command line: `["quant=mse", "bits=w4a8"]`.

    Raises:
        QexpError: A choice or a key does not exist, or a value is not allowed; the message names the nearest ones.
    """
    words = key_maps_quoted(rules_added(list(overrides)))
    register()
    check_choices(words, CONF)
    held = GlobalHydra.instance().hydra if GlobalHydra.instance().is_initialized() else None
    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(str(CONF), version_base="1.3"):
            whole = compose("config", overrides=words, return_hydra_config=True)
    except HydraException as error:
        raise QexpError(str(error).splitlines()[0]) from None
    finally:
        GlobalHydra.instance().hydra = held
    choices = dict(whole.hydra.runtime.choices)
    with open_dict(whole):
        del whole["hydra"]
    return read(named(whole, choices))
