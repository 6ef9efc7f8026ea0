"""Networks that take pixels as they are stored (`quant.pixels`), so that their users need not normalise images."""

from __future__ import annotations

import copy
import logging
from dataclasses import replace

from qexp.data.contract import DataSet
from qexp.data.tensors import Normalize
from qexp.errors import QexpError
from qexp.network.facts import facts
from qexp.passes.pixel_input import PixelGrid, fold_pixels, readers
from qexp.passes.unchanged import check_results, results
from qexp.run.experiment import Experiment
from qexp.run.settings import Settings

log = logging.getLogger(__name__)
RULE = "pixels"


def check(settings: Settings, data: DataSet) -> None:
    """Raises, before any work, if the run sets `quant.pixels` and cannot use it."""
    if settings.method.pixels is None:
        return
    if settings.trains and settings.schedule.distill is not None:
        raise QexpError(
            f"quant.pixels={settings.method.pixels} is not allowed with schedule.distill, whose teacher takes normalised images; train "
            "without quant.pixels"
        )
    if not isinstance(getattr(data, "normalize", None), Normalize):
        raise QexpError(
            f"quant.pixels={settings.method.pixels}: dataset={settings.data.name} does not define how it normalises pixels"
        )


def of(settings: Settings, data: DataSet) -> DataSet:
    """Returns the data set of the run's quantized network: pixels that are only shifted and scaled, or the images unchanged."""
    if settings.method.pixels is None:
        return data
    how, grid = data.normalize, _grid(data)
    seen = copy.copy(data)
    seen.__dict__.pop("fingerprint", None)  # computed from the normalised images
    channels = len(how.mean)
    seen.normalize = replace(
        how, mean=tuple(z * grid.unit for z in grid.zero), std=(1.0,) * channels, max_value=1 / grid.unit
    )
    return seen


def take(run: Experiment) -> None:
    """Makes the float network take pixels, in place, with `quant.pixels`; the run's images and data set become pixels too.

    Raises:
        QexpError: The network's first layers do not allow it, or the changed network computes something else.
    """
    form = run.settings.method.pixels
    if form is None:
        return
    how, grid = run.data.normalize, _grid(run.data)
    names = readers(run.model, run.data.example())
    before = results(run.model, run.images[0])
    fold_pixels(run.model, names, grid, {"std": how.std, "max_value": how.max_value}, form)
    run.data = of(run.settings, run.data)
    run.context.images = run.data.calibration_batches(
        run.settings.n_calibrate, run.settings.data.calibration_batch, run.settings.seed
    )
    if form == "exact":
        check_results(run.model, run.images[0], before, f"quant.pixels={form}")
    run.context.facts = facts(run.model, run.data.example())
    run.rules[RULE] = grid.rule(names)
    log.info("images are pixels 0 to 255; mean and std were folded into %s", ", ".join(names))


def _grid(data: DataSet) -> PixelGrid:
    return PixelGrid.of(data.normalize.mean, data.normalize.std, data.normalize.max_value)
