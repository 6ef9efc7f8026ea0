"""Data sets, loaded once per process: every point of a sweep shares them."""

from __future__ import annotations

import json

from qexp.data.contract import DataSet
from qexp.run.settings.checks import Spec
from qexp.system.objects import make

_loaded: dict[str] = {}


def load_data(spec: Spec) -> DataSet:
    """Returns the data module of a specification, the same object for the same specification."""
    key = json.dumps(spec, sort_keys=True, default=str)
    if key not in _loaded:
        data = make(spec, where="dataset.data")
        data.setup()
        _loaded.clear()  # one set at a time: the next point of a sweep most likely uses the same
        _loaded[key] = data
    return _loaded[key]
