"""`python -m qexp.command.check_plugin NAME|FOLDER`: tries everything that a plugin, or a folder of YAML, adds to the groups.

Every file has to compose; every quantizer has to keep the contract of quantizers on ordinary and ugly tensors, every network to return
one score per class and to carry quantizers, every data set to keep its parts apart. One line per choice; exit status 1 if one fails.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from qexp.command.compose import settings_of
from qexp.command.contracts import others, quantizer
from qexp.command.folders import CONF
from qexp.command.listing import offered
from qexp.command.plugins import GROUP, VARIABLE, folder_of, own_folders, plugins
from qexp.errors import QexpError, near
from qexp.run.settings import Settings

USAGE = "usage: qexp check-plugin NAME|FOLDER   (NAME of an installed plugin; FOLDER that holds model/, quant/, ...)"
SITES = ("input", "weight", "bias", "output")


def main(words: Sequence[str] | None = None) -> int:
    """Prints a line per choice, and the faults of those that have some; returns the exit status."""
    words = list(sys.argv[1:] if words is None else words)
    if words in (["--help"], ["-h"]):
        print(USAGE)
        return 0
    if len(words) != 1 or words[0].startswith("-"):
        print(USAGE, file=sys.stderr)
        return 2
    logging.basicConfig(level=logging.ERROR, format="%(message)s")
    try:
        folder = located(words[0])
        failed = 0
        for choice, faults in check(folder):
            print(
                f"{choice:40} {'ok' if not faults else 'FAILED'}",
                *(f"    {fault}" for fault in faults),
                sep="\n",
                flush=True,
            )
            failed += bool(faults)
    except QexpError as error:
        print(error, file=sys.stderr)
        return 2
    return int(failed > 0)


def located(name: str) -> Path:
    """Returns the folder of an installed plugin's name, or the folder itself; it joins `QEXP_CONFIG_PATH` if it is not known yet."""
    installed = {plugin.name: plugin for plugin in plugins()}
    folder = folder_of(installed[name]) if name in installed else Path(name).expanduser().absolute()
    if not folder.is_dir():
        known = (
            f"; installed are {', '.join(installed)}"
            if installed
            else f"; no plugin is installed (entry points {GROUP})"
        )
        raise QexpError(
            f"{name}: there is no such folder, and no plugin of that name{near(name, list(installed))}{known}"
        )
    if (folder / "conf").is_dir():
        folder = folder / "conf"
    if folder not in own_folders():
        os.environ[VARIABLE] = os.pathsep.join(filter(None, [os.environ.get(VARIABLE), str(folder)]))
        sys.path.append(str(folder.parent))  # a package beside its folder of YAML
    return folder


def check(folder: Path) -> Iterator[tuple[str, list[str]]]:
    """Yields each choice of a folder with its faults."""
    groups = sorted(group.name for group in folder.iterdir() if group.is_dir())
    known = {group.name for group in CONF.iterdir() if group.is_dir()}
    choices = [(group, name) for group in groups if group in known for name in offered([folder], group)]
    if not choices:
        raise QexpError(
            f"{folder}: no choices in it; it has to hold groups, such as model/NAME.yaml or quant/NAME.yaml"
        )
    for group, name in choices:
        try:
            yield f"{group}={name}", list(faults_of(group, settings_of([f"{group}={name}"])))
        except Exception as error:
            yield f"{group}={name}", [others.no_fault(error)]


def faults_of(group: str, settings: Settings) -> Iterator[str]:
    """Yields the faults of one choice of a group; of other groups only the settings are read."""
    if group == "quant":
        for place, site, spec in specifications(settings):
            for fault in quantizer.faults(spec, site):
                yield f"{place}: {fault}"
    elif group == "model":
        yield from others.network_faults(settings)
    elif group == "dataset":
        yield from others.dataset_faults(settings)


def specifications(settings: Settings) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Yields the quantizers that a recipe names for its sites and in its rules, each once: place, site, specification."""
    seen = []
    parts = {
        "quant": settings.method.sites,
        **{f"quant.rules.{n}": rule or {} for n, rule in settings.method.rules.items()},
    }
    for place, part in parts.items():
        for site in SITES:
            spec = part.get(site)
            if isinstance(spec, dict) and "_target_" in spec and (site, spec) not in seen:
                seen.append((site, spec))
                yield f"{place}.{site}", site, spec


if __name__ == "__main__":
    sys.exit(main())
