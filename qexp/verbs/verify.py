"""`qexp.verify`: the proof that integers compute the codes that the simulation computes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pandas as pd
from torch import nn

from qexp.errors import QexpError
from qexp.integer import verify as proof
from qexp.integer.lowered import Lowered
from qexp.integer.lowering import lower
from qexp.integer.program import IntegerProgram
from qexp.integer.verify import Verdict
from qexp.layers.quantized import quantizers
from qexp.layers.swap import baked_weights
from qexp.quantizers.accumulator_bias import AccumulatorBias
from qexp.results.judging import Judge
from qexp.verbs.images import GivenImages, is_labels
from qexp.verbs.quantize import QuantizedNetwork


@dataclass
class Proof:
    """A network's integer program, and how its codes compare with the simulation's.

    Attributes:
        program: The program: codes, multipliers and shifts, integer biases; `qexp.integer.files.save` writes it.
        verdict: The counts: codes compared and different, by tensor; predictions that differ; the integers' own score.
        lowered: The program with its links to the layers of the network.
    """

    program: IntegerProgram
    verdict: Verdict
    lowered: Lowered

    @property
    def equal(self) -> bool:
        """Whether every code of the simulation with integer rounding equals the program's."""
        return self.verdict.equal

    @property
    def table(self) -> pd.DataFrame:
        """One row per tensor, in order of execution: codes compared, different, and by how much."""
        return self.verdict.frame(self.lowered)

    @property
    def counts(self) -> dict[str, Any]:
        """The totals: images, codes and predictions that differ, with integer rounding and with real scales."""
        return self.verdict.metrics() | {"verify_codes": sum(c.total for c in self.verdict.integer.values())}

    def __repr__(self) -> str:
        return f"Proof({self.verdict.line()})"


def verify(model: nn.Module | QuantizedNetwork, images: Any, most: int = 1000, progress: bool = False) -> Proof:
    """Returns the integer program of a quantized network and the proof, code by code, that it computes what was simulated.

    Args:
        model: The result of `qexp.quantize` or of `qexp.load`, or another network whose weights and activations carry quantizers.
        images: Images, prepared as the network takes them: a tensor `[N, C, H, W]`, a list of such batches, or a loader of batches or of
            `(images, labels)`; with labels, `verdict.score` is the accuracy of the integers.
        most: Compare at most this many images.
        progress: Show a progress bar.

    Returns:
        The proof; `equal` says whether all codes agree.

    Raises:
        QexpError: A part of the network has no integer form. The message names the layer, the reason and what to do; `deploy=integer`
            or `deploy=int8` of `qexp.quantize` add the quantizers that integers need.

    Example:
        >>> import torch, qexp
        >>> from qexp.models.digits_cnn import DigitsCNN
        >>> images = torch.randn(32, 1, 8, 8, generator=torch.Generator().manual_seed(0))
        >>> proof = qexp.verify(qexp.quantize(DigitsCNN(width=4), images, "mse", "w4a8", "deploy=integer"), images)
        >>> proof.equal, proof.counts["verify_codes_differ"], proof.counts["verify_images"]
        (True, 0, 32)
    """
    data = GivenImages(images, most)
    network, lowered = lowered_of(model, data)
    with baked_weights(network):
        verdict = proof.verify(network, lowered, data.batches, progress=progress, judge=judge_of(network, data))
    return Proof(lowered.program, verdict, lowered)


def lowered_of(model: nn.Module | QuantizedNetwork, data: GivenImages) -> tuple[nn.Module, Lowered]:
    """Returns the network and its integer program."""
    network = network_of(model)
    found = list(quantizers(network))
    if not found:
        raise QexpError(
            f"model={type(network).__name__} has no quantizers; quantize it first, qexp.quantize(model, images)"
        )
    # a network that qexp.load returns comes without settings; biases in steps of the accumulator are what deploy=int8 adds
    as_runtimes = any(isinstance(q, AccumulatorBias) for _, _, q in found)
    if isinstance(model, QuantizedNetwork):
        as_runtimes = model.as_runtimes
    return network, lower(
        network.cpu(), data.example().cpu(), {"model": type(network).__name__}, as_runtimes=as_runtimes
    )


def network_of(model: nn.Module | QuantizedNetwork) -> nn.Module:
    """Returns the network itself."""
    network = model.network if isinstance(model, QuantizedNetwork) else model
    if not isinstance(network, nn.Module):
        raise QexpError(f"model={type(model).__name__} is not allowed; give a network, or what qexp.quantize returned")
    return network


def judge_of(network: nn.Module, data: GivenImages) -> Judge | None:
    """Returns the classification task if the images come with one class each, else None."""
    targets = [labels for _, labels in data.batches]
    if not all(is_labels(labels) for labels in targets):
        return None
    from qexp.tasks.classification import Classification  # Lightning takes seconds to import

    classes = network(data.example().cpu())
    return Classification(network, num_classes=classes.shape[1]) if getattr(classes, "ndim", 0) == 2 else None
