"""The calibration phase: runs the float model once over a few hundred images and fits every quantizer to the collected statistics."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Container, Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from tqdm import tqdm

from qexp.calibration.cache import content_hash, save_stats
from qexp.calibration.memory_cache import kept_stats, weight_stats
from qexp.calibration.site_stats import Calibration, SiteStats
from qexp.errors import QexpError
from qexp.layers.calls import all_calls
from qexp.layers.quantized import QUANTIZED, activation_axis, float_class, main, operands, quantizers, weight_of
from qexp.layers.swap import evaluating, quantizers_off
from qexp.numerics.granularity import PerChannel, PerGroup
from qexp.quantizers.base import Quantizer
from qexp.statistics.collectors import Collector, merged
from qexp.statistics.stats import NonFinite, TensorStats
from qexp.system import ranks
from qexp.system.within import hooked

log = logging.getLogger(__name__)
CHANNEL_BINS = 2048  # with fewer bins, a range search at 8 bits has more than 1 % more error


@torch.no_grad()
def collect(
    model: nn.Module,
    batches: Sequence[Tensor],
    channel_histograms: bool = False,
    progress: bool = True,
    collectors: Sequence[Collector] = (),
    quantized: bool = False,
    device: torch.device | None = None,
) -> Calibration:
    """Returns the statistics of every tensor that could carry a quantizer, from one pass of the float model over the batches.

    Args:
        model: Float or quantized model; during the pass its quantizers are off and it is in evaluation mode.
        batches: Images `[N, C, H, W]`.
        channel_histograms: Also keep one histogram per channel, for rules that search activation ranges per channel.
        progress: Show a progress bar.
        collectors: Further collectors that run on every tensor.
        quantized: Leave the quantizers on, so that the statistics are those of the quantized network.
        device: Device on which the model runs during the pass; None leaves it where it is. Statistics are on the CPU.

    Raises:
        NonFinite: A tensor holds NaN or infinity; the message names the first layer, site and batch.
    """
    stats: dict[tuple[str, str], SiteStats] = {}
    aliases: dict[tuple[str, str], tuple[str, str]] = {}
    known: dict[
        int, tuple[weakref.ref, int, int]
    ] = {}  # in the first batch, by tensor id: the tensor, its version, its number
    # in the first batch, by site: its tensors and their channel axis
    carried: dict[tuple[str, str], list[tuple[int, int]]] = {}
    number = 0

    def see(key: tuple[str, str], x: Tensor) -> None:
        if key in aliases or not isinstance(x, Tensor) or not x.is_floating_point():
            return
        axis = 1 if x.ndim < 2 else activation_axis(model.get_submodule(key[0]), x.ndim)
        if number == 0:
            tensor, version, _ = known.get(id(x), (lambda: None, 0, 0))
            if tensor() is not x or version != x._version:
                known[id(x)] = (weakref.ref(x), x._version, sum(map(len, carried.values())))
            carried.setdefault(key, []).append((known[id(x)][2], axis))
            if key not in stats:
                stats[key] = SiteStats(channel=TensorStats(PerChannel(1), CHANNEL_BINS if channel_histograms else 0))
        if key not in stats:
            raise QexpError(
                f"{key[0]} ({key[1]}): ran in calibration batch {number} but not in the first; "
                "the model must run the same layers for every input"
            )
        try:
            stats[key].update(x, collectors, axis)
        except NonFinite as error:
            raise NonFinite(
                f"{key[0]} ({key[1]}), calibration batch {number}: {error}; check the weights and the preprocessing"
            ) from None

    def before(name: str):
        def hook(_, args, kwargs):
            tensors = operands(args, kwargs)
            for i, x in enumerate(tensors):
                see((name, "input" if len(tensors) == 1 else f"input.{i}"), x)

        return hook

    def watching() -> Iterator[RemovableHandle]:
        for name, module in model.named_modules():
            if float_class(module) in QUANTIZED:
                yield module.register_forward_pre_hook(before(name), with_kwargs=True)
                yield module.register_forward_hook(lambda _, __, y, name=name: see((name, "output"), main(y)))

    home = next((t.device for t in model.parameters()), torch.device("cpu"))
    try:
        model.to(device or home)
        with (
            all_calls(model),
            hooked(watching()),
            evaluating(model),
            nullcontext() if quantized else quantizers_off(model),
        ):
            bar = tqdm(batches, desc="calibrate", unit="batch", leave=False, disable=not progress)
            for number, images in enumerate(bar):
                model(images if device is None else images.to(device))
                if number == 0:
                    aliases.update(_same(carried))
                    for key in aliases:
                        del stats[key]
    finally:
        model.to(home)
    calibration = Calibration(stats, aliases)
    calibration.sync(collectors)
    return calibration


def _same(carried: dict[tuple[str, str], list[tuple[int, int]]]) -> dict[tuple[str, str], tuple[str, str]]:
    """Returns, for each site that had the same tensors as an earlier one in all its calls, that earlier site."""
    first: dict[tuple[tuple[int, int], ...], tuple[str, str]] = {}
    return {
        key: first[t] for key, t in ((k, tuple(ts)) for k, ts in carried.items()) if first.setdefault(t, key) != key
    }


def calibrate(
    model: nn.Module,
    batches: Sequence[Tensor],
    *,
    followed_by_relu: frozenset[str] = frozenset(),
    cache_dir: Path | None = None,
    progress: bool = True,
    before_fit: Callable[[Calibration], None] | None = None,
    device: torch.device | None = None,
    processes: int = 1,
) -> Calibration:
    """Fits every quantizer of the model and returns the statistics.

    The statistics are those of the float model, so one pass serves every method at every width. With `cache_dir` they are stored under a
    hash of weights, images and sites, and the next run reads them.

    Args:
        model: Quantized model.
        batches: Calibration images `[N, C, H, W]`, already preprocessed; never of the evaluation split.
        followed_by_relu: Layers whose output goes straight into a ReLU.
        cache_dir: Folder of stored statistics; None stores none.
        progress: Show a progress bar.
        before_fit: Called with the statistics before quantizers take their ranges from them.
        device: Device of the forward pass; None leaves the model where it is.
        processes: Number of processes that share the batches; their statistics are merged in the order of the batches.
    """
    if not len(batches):
        raise QexpError("calibration got no images; set n_calibrate to at least one batch")
    channelwise, asked = wanted(model)
    with all_calls(model):  # statistics are those of every tensor that could carry a quantizer
        path = cache_dir and Path(cache_dir) / f"{content_hash(model, batches, channelwise, asked)}.safetensors"
    calibration = kept_stats(path) if path else None
    if calibration is None:
        job = (model, batches, channelwise, progress, asked, device)
        share, gpu = min(processes, len(batches)), device is not None and device.type == "cuda"
        calibration = ranks.spread(_collect_share, share, *job, gpu=gpu) if share > 1 else _collect_share(*job)
        if path:
            save_stats(calibration, path)
    else:
        log.info("calibration: statistics found in %s, no forward pass needed", path)
    if before_fit is not None:
        before_fit(calibration)
    fit(model, calibration, followed_by_relu)
    return calibration


def _collect_share(
    model: nn.Module,
    batches: Sequence[Tensor],
    channelwise: bool,
    progress: bool,
    collectors: Sequence[Collector],
    device: torch.device | None,
) -> Calibration:
    """Returns the merged statistics of all ranks; each rank runs its share of the batches."""
    if device is not None and device.type == "cuda" and ranks.world() > 1:
        device = torch.device("cuda", ranks.rank())
    progress = progress and ranks.rank() == 0
    return collect(model, ranks.share(batches), channelwise, progress, collectors, device=device)


def wanted(model: nn.Module) -> tuple[bool, list[Collector]]:
    """Returns whether the model's quantizers need channel histograms, and the collectors they need."""
    channelwise = any(
        weight_of(model.get_submodule(name), site) is None and q.granularity.axis is not None and q.needs_histogram
        for name, site, q in quantizers(model)
    )
    return channelwise, sorted({c for _, _, q in quantizers(model) for c in q.collectors}, key=lambda c: c.name)


@torch.no_grad()
def fit(
    model: nn.Module,
    calibration: Calibration,
    followed_by_relu: frozenset[str] = frozenset(),
    only: Container[int] | None = None,
) -> None:
    """Fits every quantizer (or those whose id is in `only`): weights from the weight itself, activations from calibration."""
    pooled: dict[int, TensorStats] = {}
    before_relu: dict[int, bool] = {}  # by quantizer: whether a ReLU follows all the sites that share it
    for name, site, quantizer in quantizers(model):
        if only is not None and id(quantizer) not in only:
            continue
        layer = model.get_submodule(name)
        weight = weight_of(layer, site)
        if weight is not None:
            try:
                stats = weight_stats(weight, quantizer.granularity)
            except NonFinite as error:
                raise NonFinite(f"{name} ({site}): {error}") from None
            stats.extra = {c.name: merged(c, None, c.first(weight)) for c in quantizer.collectors}
        else:
            if (name, site) not in calibration:
                raise QexpError(
                    f"{name} ({site}): calibration never saw this tensor; the layer did not run on the calibration images"
                )
            if isinstance(quantizer.granularity, PerGroup):
                raise QexpError(
                    f"{name} ({site}): granularity={quantizer.granularity} is for weights only; use tensor or channel"
                )
            stats = _of_calls(calibration[name, site], name, site, quantizer)
        if id(quantizer) in pooled:  # a quantizer that several sites share is fitted on the statistics of all of them
            one, other = pooled[id(quantizer)], stats
            stats = TensorStats(one.granularity, one.bins)
            stats.merge(one)
            stats.merge(other)
            stats.extra = {c.name: c.merge(one.extra[c.name], other.extra[c.name]) for c in quantizer.collectors}
        pooled[id(quantizer)] = stats
        relu = site == "output" and name in followed_by_relu
        before_relu[id(quantizer)] = relu and before_relu.get(id(quantizer), True)
        quantizer.fit(stats, followed_by_relu=before_relu[id(quantizer)])


def _of_calls(seen: SiteStats, name: str, site: str, quantizer: Quantizer) -> TensorStats:
    """Returns the summary on which an activation's quantizer is fitted.

    Raises:
        QexpError: The layer is called on tensors for which this quantizer cannot have common scales or a common collected value.
    """
    stats = seen.tensor if quantizer.granularity.axis is None else seen.channel
    advice = "use granularity: tensor, use a separate module for each call, or leave this tensor in float with a rule"
    if seen.tensor.empty:
        raise QexpError(
            f"{name} ({site}): calibration never saw a value of this tensor; the layer ran on empty tensors alone, as the mask head of a "
            "detector does that finds no box; use other calibration images, or leave this tensor in float with a rule"
        )
    if stats.empty:
        raise QexpError(
            f"{name} ({site}): granularity={quantizer.granularity} is not allowed, since the layer is called at places with different "
            f"numbers of channels; {advice}"
        )
    for c in quantizer.collectors:
        if c.name in seen.extra and not seen.extra[c.name].numel():
            raise QexpError(
                f"{name} ({site}): {type(quantizer).__name__} needs tensors of one shape (for {c.name}), and the layer is called on "
                f"several; {advice.replace('granularity: tensor', 'another method there')}"
            )
    stats.extra = seen.extra
    return stats
