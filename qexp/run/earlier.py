"""Finds the record of a finished point without importing torch or reading an image, in a second instead of several.

The name of a point follows from its configuration, the files and the code that it names, and the content of its images. Only two of these
need torch: the modules of classes of qexp (found by importing them) and the hash of the images (found by reading them). A run keeps both
in `<runs_dir>/.cache/seen`, with stamps of the files they were found in. While no stamp has changed, `finished` uses what was kept and
derives everything else anew; otherwise it returns None, and the run itself decides.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import qexp
from qexp.callbacks.observers import others
from qexp.errors import QexpError
from qexp.results import identity, wording
from qexp.results.run_folder import Record, version_of
from qexp.run.contents import contents, names
from qexp.run.naming import check_study, point_hash, title
from qexp.run.settings import Integers, Settings
from qexp.system.objects import TARGET
from qexp.system.stamps import stamp
from qexp.system.whole_files import write_text

log = logging.getLogger(__name__)
MOST = 4000  # files that are kept: some ten megabytes
_STARTED = time.time_ns()  # this module is imported before any image is read
_DECODERS = ("torch", "torchvision", "numpy", "pillow", "scikit-learn")  # libraries that turn files into images


def finished(settings: Settings) -> dict[str, Any] | None:
    """Returns the metrics of a finished point and logs where they lie; None as in `found`."""
    metrics = found(settings)
    if metrics is not None:
        tell(settings, metrics, settings.runs_dir / settings.study / metrics["point"])
    return metrics


def tell(settings: Settings, metrics: Mapping[str, Any], folder: Path) -> None:
    """Logs that a point finished earlier, and the proof that it holds, if the command asks for one."""
    log.info("%s: finished earlier, %s", title(settings), folder)
    if settings.integers.verify and is_proven(settings.integers, metrics):
        log.info("%s", wording.verdict(metrics))


def found(settings: Settings) -> dict[str, Any] | None:
    """Returns the metrics of a finished point; None where it is not finished, or where that cannot be found out without torch."""
    if settings.force or settings.integers.export is not None:
        return None
    try:
        check_study(settings.study)
        kept = _path(settings)
        seen = json.loads(kept.read_text())
        if stamp(map(Path, seen["files"])).digest != seen["stamp"]:
            return None
        observers = set(seen["observers"])
        known = replace(settings, callbacks={k: v for k, v in settings.callbacks.items() if k not in observers})
        held = {**contents(known, seen["owners"]), "data": seen["images"]}
        folder = settings.runs_dir / settings.study / point_hash(known, held)
    except (
        OSError,
        ValueError,
        KeyError,
        TypeError,
        AttributeError,
        QexpError,
    ):  # the run itself raises an error where there is one
        return None
    metrics = Record(folder).finished()
    if metrics is None or not is_proven(settings.integers, metrics):
        return None
    with suppress(OSError):  # a folder that may only be read
        os.utime(kept)  # of use still, so that it stays
    return metrics


def is_proven(integers: Integers, finished: Mapping[str, Any]) -> bool:
    """Returns whether a finished point's record holds the proof: at these widths, on as many images or on all there are."""
    held, images = int(finished.get("verify_images") or 0), integers.verify
    known = {str(name).split()[0] for name in finished.get("accumulator") or {}}
    widths = {str(width) for width in integers.accumulator}
    return held >= min(images, int(finished.get("n_eval") or images)) and (not images or widths <= known)


def keep(settings: Settings, images: str, sources: list[Path] | None) -> None:
    """Keeps what `finished` needs; nothing if the files of the images are unknown or changed while this process ran.

    Args:
        settings: The settings of the point.
        images: The hash of the images' content.
        sources: The files and folders that the images were read from.
    """
    if sources is None:
        return
    files = sorted({str(path.absolute()) for path in sources})
    found = stamp(map(Path, files))
    if found.changed >= _STARTED:
        return
    own = {name: spec for name, spec in settings.callbacks.items() if str(spec.get(TARGET)).startswith("qexp.")}
    seen = {
        "files": files,
        "stamp": found.digest,
        "images": images,
        "owners": identity.owners(names(settings)),
        "observers": sorted(own.keys() - others(own).keys()),
    }
    try:
        path = write_text(_path(settings), json.dumps(seen))
        _forget_unused(path.parent)
    except OSError as error:  # such as a full disk; the next command finds out again
        log.debug("%s: %s", _path(settings), error)


def _forget_unused(folder: Path) -> None:
    """Removes the files that were not used for longest, so that a quarter of the allowed number is free again.

    Every edit of qexp and every update of a library leaves files behind that nothing will read.
    """
    files = [entry for entry in os.scandir(folder) if entry.name.endswith(".json")]
    if len(files) <= MOST:
        return
    for old in sorted(files, key=lambda entry: entry.stat().st_mtime_ns)[: len(files) - MOST * 3 // 4]:
        Path(old).unlink(missing_ok=True)


def _path(settings: Settings) -> Path:
    """Returns the file of a request: another one in another folder, for other versions, and for another source of qexp."""
    package = stamp([Path(qexp.__file__).parent]).digest
    asked = [settings.resolved, str(Path.cwd()), package, {name: version_of(name) for name in _DECODERS}]
    text = json.dumps(asked, sort_keys=True, default=str)
    return settings.shared / "seen" / f"{hashlib.sha256(text.encode()).hexdigest()[:16]}.json"
