"""One experiment from settings to record: the only place that orders the steps."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import torch

from qexp.calibration.calibrate import calibrate, fit
from qexp.calibration.site_stats import Calibration
from qexp.callbacks.kernels import load_kernels
from qexp.callbacks.tracked import Tracked
from qexp.data.contract import DataSet
from qexp.errors import QexpError
from qexp.layers.swap import check_all_ran
from qexp.network.cost import params
from qexp.network.facts import facts
from qexp.network.linking import link
from qexp.passes.base import Pass, PassContext
from qexp.passes.fold_bn import fold_bn, is_unfolded
from qexp.passes.permanent import make_permanent
from qexp.passes.unchanged import edit_floats, unchanged
from qexp.recipe import Recipe, apply, resolve
from qexp.recipe.plan import Source
from qexp.results.run_folder import Record, peak_mb
from qexp.run import (
    contents,
    devices,
    earlier,
    export_finished,
    float_network,
    integer_proof,
    outcome,
    pixels,
    stages,
    teacher,
    training,
)
from qexp.run.datasets import load_data
from qexp.run.experiment import Experiment
from qexp.run.naming import asked, check_study, point_hash, title
from qexp.run.saved_network import Origin
from qexp.run.settings import Settings
from qexp.run.trackers import Trackers
from qexp.search.context import SearchContext
from qexp.system import disk, memory
from qexp.system.objects import make
from qexp.system.whole_files import remove_leftovers

log = logging.getLogger(__name__)


def run(settings: Settings) -> dict[str, Any]:
    """Runs one point and returns its metrics. A finished point is not run again; a failure is recorded and returned.

    Args:
        settings: The settings of the point.

    Returns:
        The columns of `results.csv` for this point, including `status` (`ok` or `failed`).
    """
    if settings.integers.export is not None:
        return export_finished.again(settings)
    try:
        check_study(settings.study)
    except QexpError as error:  # there is no folder to record it in
        log.error("%s", error)
        return {"status": "failed", "error": f"QexpError: {error}"}
    remove_leftovers(settings.shared)
    study, request = settings.runs_dir / settings.study, point_hash(settings, {})
    record = Record(study / f"failed-{request}", request)  # until the contents that name the point are known
    try:
        data = load_data(settings.data.module)
        held = {**contents.contents(settings), "data": data.fingerprint()}
        record = Record(study / point_hash(settings, held), request, contents.about(settings))
        earlier.keep(settings, data.fingerprint(), data.known_sources())
        with record.locked(title(settings)):
            finished = record.finished()
            if finished is not None and not settings.force:
                earlier.tell(settings, finished, record.folder)
                is_given = earlier.is_proven(settings.integers, finished)
                return finished if is_given else export_finished.proven(settings, data, record)
            trackers = Trackers()
            try:
                record.open(settings.yaml, start_over=settings.force)
                if settings.force:
                    record.start_over()
                trackers = Trackers.of(settings, record.folder)
                metrics = experiment(settings, data, record, trackers).metrics
                trackers.finish(metrics, record.folder)
                return metrics
            except Exception as error:  # one point's failure is recorded, and the sweep continues
                metrics = failed(settings, record, error)
                trackers.finish(metrics, record.folder)
                return metrics
            except KeyboardInterrupt:
                log.warning("%s: interrupted", title(settings))
                raise
            finally:
                record.close()
    except Exception as error:
        return failed(settings, record, error)


def failed(settings: Settings, record: Record, error: Exception) -> dict[str, Any]:
    """Records a failure and returns its row; logs one line for a user's mistake, a full disk or used-up memory, a traceback for a bug."""
    if not isinstance(error, QexpError) and (trouble := disk.trouble(error) or memory.trouble(error)):
        error = QexpError(trouble)
    log.error("%s failed: %s", title(settings), error, exc_info=None if isinstance(error, QexpError) else error)
    return record.failed(asked(settings), error)


def experiment(settings: Settings, data: DataSet, record: Record, trackers: Trackers | None = None) -> Experiment:
    """Runs one point; puts the results into its folder and its `metrics`, and sends curves to the trackers."""
    run = start(settings, data, record, trackers or Trackers())
    distill = teacher.distillation(run) if settings.trains else None
    fold(run)
    pixels.take(run)
    data = run.data
    for edit in run.passes:
        edit_floats(edit, run.model, run.context)
    attach(run)
    stages.check(settings.schedule, run.plan, run.passes)
    record.checked = True
    with run.timed("calibrate"):
        find_ranges(run)
        check_all_ran(run.model, data.example())
    if settings.search is not None:
        with run.timed("search"):
            search(run)
    with run.timed("calibrate"):
        for edit in run.passes:
            edit.on_fitted(run.model, run.context)
    integer_proof.check(run)
    if settings.trains:
        stages.train(run, distill)
        for edit in run.passes:
            edit.on_trained(run.model, run.context)
    with integer_proof.rounding(run):
        run.score, run.seconds["evaluate"] = training.evaluate(
            run.model, data, settings, run.title, run.folder, run.context.findings
        )
    run.metrics = {
        **outcome.metrics(run),
        "peak_mb": peak_mb(),
        **data.notes(),
        **run.context.findings,
        **integer_proof.prove(run),
    }
    training.task(settings, run.model).leave(run.folder, run.score, run.reference, data)
    outcome.write(run)
    log.info("%s: %s", run.title, outcome.line(run.metrics))
    if any(entry.source is Source.SEARCH for entry in run.plan):
        log.info("%s", outcome.next_step(run))
    return run


def start(settings: Settings, data: DataSet, record: Record, trackers: Trackers) -> Experiment:
    """Returns the run with its calibration images and its float network, which is scored if it has been trained."""
    training.check_trainer(settings)
    kernels = load_kernels(settings.kernels)
    devices.share_machine(settings.trainer)
    devices.set_products(settings.trainer)
    devices.lay_out_images(data, settings.trainer)
    training.seed(settings.seed)
    check_images(settings, data)
    pixels.check(settings, data)
    log.info("%s -> %s", title(settings), record.folder)
    scratch = settings.schedule.from_scratch
    if not scratch and float_network.is_untrained(settings, data):
        check_recipe(settings, data)
        record.checked = True
    # the curves of a float network that serves other points belong to none of them
    observers = [Tracked(trackers.log)] if settings.schedule.is_float and trackers.loggers else []
    model = float_network.build(settings, data) if scratch else float_network.float_model(settings, data, observers)
    reference = None if scratch else float_network.reference(settings, model, data, record.folder)
    outcome.warn_of_chance(reference, settings.data.num_classes)
    images = calibration_images(settings, data)
    make_permanent(model, images[0])
    devices.lay_out_weights(model, settings.trainer)
    origin = Origin.of(model, None if scratch else float_network.source(settings, data))
    context = PassContext(
        facts(model, data.example()),
        images,
        {},
        folder=record.folder,
        seed=settings.seed,
        device=devices.device(settings.trainer),
        progress=settings.trainer.progress,
        judge=training.task(settings, model),
    )
    passes = load_passes(settings)
    return Experiment(
        settings,
        data,
        record,
        model,
        context,
        passes,
        origin=origin,
        params=params(model),
        reference=reference,
        trackers=trackers,
        kernels=kernels,
    )


def check_recipe(settings: Settings, data: DataSet) -> None:
    """Raises if the recipe is wrong: it is resolved on a network with random weights, before a float network is trained for it.

    A pass that edits the float network may create the layers that the recipe names; such a recipe is checked after training.
    """
    passes = load_passes(settings)
    if any(type(edit).on_float is not Pass.on_float for edit in passes):
        return
    model = float_network.build(settings, data)
    make_permanent(model, data.example())
    found = facts(model, data.example())
    if settings.bn == "fold" and found.bn_of:
        fold_bn(model, found)
        found = facts(model, data.example())
    plan = resolve(model, found, recipe(settings))
    apply(model, plan, found)
    stages.check(settings.schedule, plan, passes)


def check_images(settings: Settings, data: DataSet) -> None:
    """Raises if the data set's images or number of classes do not fit the network."""
    takes, given = settings.network.input_size, list(data.example().shape[1:])
    if takes is not None and given != list(takes):
        raise QexpError(
            f"model={settings.network.name} takes images {list(takes)}, dataset={settings.data.name} has {given}; "
            "choose another dataset or model (channels, height, width must agree), or model.input_size=null where the network takes "
            "images of any size"
        )
    classes = getattr(data, "num_classes", None)
    if classes is not None and classes != settings.data.num_classes:
        raise QexpError(
            f"dataset.num_classes={settings.data.num_classes} is not allowed; dataset={settings.data.name} has {classes} classes"
        )


def calibration_images(settings: Settings, data: DataSet) -> list[torch.Tensor]:
    """Returns the calibration batches; with `n_calibrate=0`, where nothing is quantized, one image for tracing."""
    if settings.n_calibrate == 0 and (settings.schedule.is_float or settings.widths.are_float):
        return [data.example()]
    return data.calibration_batches(settings.n_calibrate, settings.data.calibration_batch, settings.seed)


def fold(run: Experiment) -> None:
    """Folds batch norms in place, with `bn=fold`; puts the facts of the resulting network into the context.

    Raises:
        QexpError: The folded network computes something else.
    """
    found, context = run.facts, run.context
    if found.trace_error:
        log.warning(
            "%s has no graph (%s); it is quantized layer by layer, without what needs a graph: folding of batch norms, equalization, "
            "ranges that account for a ReLU, evaluation in fewer passes, an integer program",
            type(run.model).__name__,
            found.trace_error,
        )
    if run.settings.bn == "fold" and found.bn_of:
        with unchanged(run.model, run.images[0], "bn=fold"):
            context.folded = fold_bn(run.model, found)
        log.info("batch norm folded into %d convolutions", len(context.folded))
        context.facts = facts(run.model, run.data.example())
    left = [name for name, m in run.model.named_modules() if is_unfolded(m)]
    if run.settings.bn == "fold" and left:
        log.info(
            "%d batch norms are not folded, since they do not follow a single convolution or have no statistics: %s",
            len(left),
            ", ".join(left[:4]) + (" ..." if len(left) > 4 else ""),
        )
        if not context.folded:
            context.findings["bn"] = "keep"  # the record holds what was done, which may differ from `bn`
    run.origin.folded(run.model)


def load_passes(settings: Settings) -> list[Pass]:
    """Returns the recipe's passes, then those of `passes=`, each in the order written; a name in both keeps the recipe's position."""
    return [make(spec, where=f"passes.{name}") for name, spec in settings.all_passes.items()]


def attach(run: Experiment) -> None:
    """Attaches the recipe's quantizers, in place, and prints the plan."""
    run.plan = resolve(run.model, run.facts, recipe(run.settings, run.rules))
    # A sweep's plans are in each point's layers.csv.
    words = outcome.plan_line if run.settings.in_sweep else outcome.plan_summary
    log.info("%s", words(run.plan, run.facts, run.model))
    apply(run.model, run.plan, run.facts)


def recipe(settings: Settings, more: Mapping[str, Any] | None = None) -> Recipe:
    """Returns the recipe of the settings, followed by the rules that the run adds."""
    if settings.schedule.is_float:
        return Recipe(sites={}, wbit=32, abit=32)
    network, widths = settings.network, settings.widths
    return Recipe(
        sites=settings.method.sites,
        rules={**settings.method.rules, **(more or {})},
        wbit=widths.weights,
        abit=widths.inputs,
        groups=network.groups,
        first=network.first,
        last=network.last,
        plan=widths.plan,
    )


def find_ranges(run: Experiment, keep: bool = True) -> None:
    """Fits every quantizer on the statistics of the calibration images, and puts these into the context; runs share kept statistics."""

    def before_fit(seen: Calibration) -> None:
        run.context.calibration = seen
        for edit in run.passes:
            edit.on_statistics(run.model, run.context)

    calibrate(
        run.model,
        run.images,
        followed_by_relu=run.facts.followed_by_relu,
        cache_dir=run.settings.shared / "calibration" if keep else None,
        progress=run.settings.trainer.progress,
        before_fit=before_fit,
        device=run.context.device,
        processes=devices.processes(run.settings.trainer),
    )


def search(run: Experiment) -> None:
    """Runs the search that the settings name on held-out training images; the run continues with the plan it returns."""

    def refit() -> None:
        link(run.model, run.facts)
        for edit in run.passes:
            edit.on_statistics(run.model, run.context)
        fit(run.model, run.statistics, run.facts.followed_by_relu)

    asked_for = run.plan
    run.plan = make(run.settings.search, where="search")(
        SearchContext(
            run.model,
            run.plan,
            run.facts,
            refit,
            run.data.val_dataloader(),
            run.folder,
            run.settings.shared,
            seed=run.settings.seed,
            progress=run.settings.trainer.progress,
            findings=run.context.findings,
            judge=run.context.judge,
        )
    )
    if run.plan is not asked_for:
        log.info("%s", outcome.found_by_search(asked_for, run.plan))
