"""Unpacks an entry of the zoo into the folder of a finished run, which every export and page reads."""

from __future__ import annotations

import json
from pathlib import Path

import yaml
from safetensors.torch import save

from qexp.models.packed_state import unpacked
from qexp.results import zoo
from qexp.results.run_folder import Record
from qexp.run import saved_network

ORIGIN = "zoo"  # in the record of such a run: the hash of the entry's card


def unpack(source: str, runs_dir: Path) -> Path:
    """Returns the folder `<runs_dir>/zoo/NAME` of an entry as a finished run; made once, and anew where the entry has changed.

    Raises:
        QexpError: There is no such entry, or one of its files was changed.
    """
    entry = zoo.read(source)
    record, card = Record(runs_dir / "zoo" / entry.card["name"]), zoo.content(source)
    if (record.finished() or {}).get(ORIGIN) == card:
        return record.folder
    about, arrays = entry.network()
    tensors = unpacked(about, arrays)
    about.pop("packed")
    record.metrics_path.unlink(missing_ok=True)
    config = {**entry.config(), "runs_dir": str(runs_dir)}
    record.write("config.yaml", yaml.safe_dump(config, sort_keys=False, allow_unicode=True, width=1000))
    record.write_bytes(saved_network.FILE, save(tensors, metadata={"qexp": json.dumps(about)}))
    record.metrics({**entry.card["row"], "study": "zoo", "point": entry.card["name"], ORIGIN: card})
    return record.folder
