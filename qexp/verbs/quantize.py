"""`qexp.quantize`: post-training quantization of a network at hand, with any recipe of `conf/quant` or one of the caller's own."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn

from qexp.calibration.site_stats import Calibration
from qexp.command.compose import settings_of
from qexp.errors import QexpError
from qexp.integer.arithmetic import FLOAT32
from qexp.layers.swap import check_all_ran, evaluating
from qexp.network.facts import Facts, facts
from qexp.passes.base import PassContext
from qexp.passes.permanent import make_permanent
from qexp.passes.unchanged import edit_floats
from qexp.recipe import Plan, Recipe, apply, resolve
from qexp.run import pipeline
from qexp.run.experiment import Experiment
from qexp.run.saved_network import Origin
from qexp.run.settings import Settings
from qexp.verbs.images import GivenImages

# groups and keys of the command line that a network at hand replaces
GIVEN = {
    **dict.fromkeys(("model", "weights"), "the network is the first argument"),
    **dict.fromkeys(("dataset", "n_calibrate"), "the images are the second argument"),
    "quant": "use the argument quant",
    "bits": "use the argument bits",
}


@dataclass
class QuantizedNetwork:
    """A network with its quantizers, and what they were fitted on.

    Attributes:
        network: The quantized network, in evaluation mode; an ordinary `nn.Module` with the parameter names of the float one.
        plan: The quantizer of each tensor of each layer, with the rule that decided it.
        calibration: Statistics of each tensor that could carry a quantizer, by (layer, site).
        facts: Facts of the network's graph: order and shapes of layers, sources, folded batch norms.
        images: The calibration batches `[N, C, H, W]`.
        findings: Results of the recipe's passes, by name.
        settings: Every setting of the recipe.
    """

    network: nn.Module
    plan: Plan
    calibration: Calibration
    facts: Facts
    images: Sequence[Tensor]
    findings: dict[str, Any] = field(default_factory=dict)
    settings: Settings | None = None

    @property
    def table(self) -> pd.DataFrame:
        """The plan as a table: layer, site, quantizer, bits, granularity, signed, range, rule."""
        return self.plan.frame()

    @property
    def as_runtimes(self) -> bool:
        """Whether its integer program rounds between layers as 8-bit runtimes do (`deploy=int8`)."""
        return self.settings is not None and self.settings.method.requantize == FLOAT32

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Any:
        """Returns the quantized network's outputs for images `[N, C, H, W]`."""
        with evaluating(self.network):
            return self.network(images)

    def __repr__(self) -> str:
        return (
            f"QuantizedNetwork({type(self.network).__name__}, {sum(e.spec is not None for e in self.plan)} quantizers)"
        )


def quantize(
    model: nn.Module,
    images: Any,
    quant: str | Recipe = "minmax",
    bits: str = "w8a8",
    *options: str,
    n_calibrate: int = 512,
    in_place: bool = False,
    progress: bool = False,
) -> QuantizedNetwork:
    """Returns a quantized copy of a network: batch norms folded, quantizers attached, their ranges found on calibration images.

    It does what a run with `schedule=ptq` does up to the evaluation; nothing is trained, scored or written. A recipe whose quantizers
    learn (`lsq`, `pact`) returns a network that is ready to be trained, with its batch norms kept.

    Args:
        model: The float network; it stays unchanged unless `in_place`.
        images: Calibration images, normalised as the network takes them: a tensor `[N, C, H, W]`, a list of such batches, or a loader
            of batches or of `(images, targets)`. They must not be the images on which the network is scored.
        quant: A recipe by name, as on the command line (`mse`, `adaround`, `lsq`), or a `qexp.Recipe`.
        bits: Widths of weights and inputs: `w4a8`. The first and the last layer keep 8 bits (`ends_bit=null` treats them like the rest).
        *options: Further `KEY=VALUE` and `GROUP=CHOICE` of the command line: `"passes=equalize"`, `"deploy=int8"`,
            `"quant.rules.stem={layers: conv1, weight: {bits: 6}}"`.
        n_calibrate: Use at most this many images.
        in_place: Quantize the network itself and not a copy.
        progress: Show progress bars.

    Returns:
        The network and all that was found out on the way: the plan as a table, the statistics, the facts of the graph.

    Raises:
        QexpError: A name or an option does not exist, a pattern matches no layer, or a layer cannot carry quantizers. The message names
            the layer and what is allowed.

    Example:
        >>> import torch, qexp
        >>> from qexp.models.digits_cnn import DigitsCNN
        >>> images = torch.randn(32, 1, 8, 8, generator=torch.Generator().manual_seed(0))
        >>> found = qexp.quantize(DigitsCNN(width=4), images, "mse", "w4a8")
        >>> found.network(images).shape
        torch.Size([32, 10])
        >>> found.table[["layer", "site", "bits", "quantizer"]].head(2).values.tolist()
        [['conv1', 'input', 8, 'uniform'], ['conv1', 'weight', 8, 'uniform']]
    """
    if not isinstance(model, nn.Module):
        raise QexpError(f"model={type(model).__name__} is not allowed; give a torch.nn.Module")
    data = GivenImages(images, n_calibrate)
    settings = _settings(model, quant, bits, options)
    settings = replace(settings, trainer=replace(settings.trainer, progress=progress), in_sweep=True)
    if settings.method.pixels is not None:
        raise QexpError(
            "deploy=int8_pixels needs images as they are stored, which only a data set has; use deploy=int8"
        )
    network = (model if in_place else copy.deepcopy(model)).eval()
    run = _start(network, data, settings)
    run.plan = resolve(network, run.facts, quant if isinstance(quant, Recipe) else pipeline.recipe(settings))
    apply(network, run.plan, run.facts)
    pipeline.find_ranges(run, keep=False)
    with evaluating(network):
        check_all_ran(network, data.example())
    for edit in run.passes:
        edit.on_fitted(network, run.context)
    return QuantizedNetwork(
        network.eval(), run.plan, run.statistics, run.facts, run.images, dict(run.context.findings), settings
    )


def _settings(model: nn.Module, quant: str | Recipe, bits: str, options: Sequence[str]) -> Settings:
    for option in options:
        key = option.lstrip("+~").partition("=")[0]
        if (why := GIVEN.get(key.partition(".")[0] if not key.startswith(("quant.", "model.")) else key)) is not None:
            raise QexpError(f"{option} is not allowed here: {why}")
    kind = type(model)
    named = [f"model.target='{kind.__module__}.{kind.__qualname__}'", "model=import"]
    method = [] if isinstance(quant, Recipe) else [f"quant={quant}", f"bits={bits}"]
    return settings_of([*named, *method, *options])


def _start(network: nn.Module, data: GivenImages, settings: Settings) -> Experiment:
    """Returns a run of the network as it is before its quantizers are attached: batch norms folded, float weights edited."""
    images = data.calibration_batches(0, 0, 0)
    make_permanent(network, images[0])
    context = PassContext(
        facts(network, data.example()), images, {}, seed=settings.seed, progress=settings.trainer.progress
    )
    passes = pipeline.load_passes(settings)
    run = Experiment(settings, data, None, network, context, passes, origin=Origin.of(network, None))
    pipeline.fold(run)
    for edit in passes:
        edit_floats(edit, network, context)
    return run
