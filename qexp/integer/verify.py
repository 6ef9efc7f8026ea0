"""The proof: runs real images through the simulation and through the integers, and compares every code."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn
from tqdm import tqdm

from qexp.integer.fast import Fast
from qexp.integer.lowered import Lowered, Site
from qexp.integer.reference import Reference
from qexp.integer.simulate import integer_rounding
from qexp.layers.quantized import attribute
from qexp.layers.swap import evaluating
from qexp.results.judging import Judge, Judged, Judging, differing, total

Take = Callable[[str, Tensor], None]


@dataclass
class Compared:
    """Differences of the codes of one tensor: number compared, different, different by one, by more, and the maximum."""

    total: int = 0
    differ: int = 0
    by_one: int = 0
    most: int = 0

    def take(self, simulated: Tensor, computed: Tensor) -> None:
        """Adds a batch."""
        gap = (simulated.long() - computed.long()).abs()
        self.total += gap.numel()
        self.differ += int((gap > 0).sum())
        self.by_one += int((gap == 1).sum())
        self.most = max(self.most, int(gap.max()) if gap.numel() else 0)

    @property
    def share(self) -> float:
        """Codes that differ, percent."""
        return 100 * self.differ / max(self.total, 1)


@dataclass
class Verdict:
    """The result of a proof.

    Attributes:
        images: Number of images compared.
        integer: By tensor, against the network simulated with the program's own rounding (`rounding=integer`).
        simulated: By tensor, against the network as it was evaluated, with real scales.
        predictions: Images whose prediction differs from the integers': `integer`, `simulated`; None if the network's task decides
            nothing per image.
        score: The integers' score by the network's task; None without targets, or if the task cannot judge outputs alone.
        reference: Images that also went through the NumPy definition, which agreed with the fast executor in every code.
    """

    images: int = 0
    integer: dict[str, Compared] = field(default_factory=dict)
    simulated: dict[str, Compared] = field(default_factory=dict)
    predictions: dict[str, int | None] = field(default_factory=lambda: {"integer": None, "simulated": None})
    score: Judged | None = None
    reference: int = 0
    reference_differ: int = 0

    @property
    def equal(self) -> bool:
        """Whether the simulation with integer rounding and the integers agree in every code."""
        codes = sum(c.differ for c in self.integer.values())
        return codes == 0 and not self.predictions["integer"] and self.reference_differ == 0

    def line(self) -> str:
        """Returns the verdict in one line."""
        word = "EQUAL" if self.equal else "DIFFERENT"
        ours = sum(c.differ for c in self.integer.values())
        codes = sum(c.total for c in self.integer.values())
        exact, real = (
            "" if count is None else f", {count} predictions"
            for count in (self.predictions["integer"], self.predictions["simulated"])
        )
        return (
            f"integers against simulation, {self.images} images: {word} ({ours} of {codes} codes differ with integer rounding{exact}); "
            f"against real scales {self.share:.4f} % of codes differ{real}"
        )

    @property
    def share(self) -> float:
        """Codes that differ from the simulation with real scales, percent of all."""
        codes = sum(c.total for c in self.simulated.values())
        return 100 * sum(c.differ for c in self.simulated.values()) / max(codes, 1)

    def metrics(self) -> dict[str, Any]:
        """Returns the columns of the run's record."""
        return {
            "verify": "equal" if self.equal else "different",
            "verify_images": self.images,
            "verify_codes_differ": sum(c.differ for c in self.integer.values()),
            "verify_predictions_differ": self.predictions["integer"],
            "verify_codes_differ_real_scales": self.share,
            "verify_most_real_scales": max((c.most for c in self.simulated.values()), default=0),
            "verify_predictions_differ_real_scales": self.predictions["simulated"],
            "verify_reference_images": self.reference,
            "value_integer": None if self.score is None else self.score.measure.stored(self.score.value),
        }

    def frame(self, lowered: Lowered) -> pd.DataFrame:
        """Returns the rows of `integer.csv`: one per tensor, in order of execution."""
        rows = []
        for (layer, site), here in lowered.sites.items():
            spec = lowered.program.tensors[here.tensor]
            with_rounding = self.integer.get(here.tensor, Compared())
            row = {
                "layer": layer or "(scores)",
                "site": site,
                "tensor": here.tensor,
                "bits": spec.bits,
                "codes": with_rounding.total,
                "differ": with_rounding.differ,
                "most": with_rounding.most,
            }
            if here.tensor in self.simulated:
                real = self.simulated[here.tensor]
                row |= {
                    "differ_real_scales": real.differ,
                    "share_real_scales": real.share,
                    "most_real_scales": real.most,
                }
            rows.append(row)
        return pd.DataFrame(rows)


@torch.no_grad()
def verify(
    model: nn.Module,
    lowered: Lowered,
    batches: Iterable[tuple[Tensor, Any]],
    reference: int = 16,
    progress: bool = True,
    judge: Judge | None = None,
) -> Verdict:
    """Returns the differences between a network and its integer program on real images.

    Args:
        model: The quantized network.
        lowered: Its program.
        batches: Images `[N, C, H, W]` and targets (or None).
        reference: Number of images of the first batch that also go through the NumPy definition.
        progress: Whether to show a bar.
        judge: The network's task, which scores the integers' outputs; without it only codes are compared.
    """
    verdict, program, judging = Verdict(), lowered.program, Judging(judge)
    gaps: dict[str, list[int | None]] = {"integer": [], "simulated": []}
    watched = {here.tensor for here in lowered.sites.values()}
    fast = Fast(program, watched=watched)
    for images, targets in tqdm(batches, desc="verify", unit="batch", leave=False, disable=not progress):
        computed: dict[str, Tensor] = {}
        codes = torch.from_numpy(program.encode(images.cpu().numpy()))
        scores = fast.run(codes, _keeper(computed, watched))
        if not verdict.images and reference:
            _against_the_definition(verdict, lowered, codes[:reference], computed, scores)
        outputs = torch.from_numpy(program.decode(scores.numpy()))
        decided = judge.decisions(outputs) if judge else None
        with integer_rounding(model, lowered, _comparer(verdict.integer, computed)):
            simulated = model(images).cpu()
        gaps["integer"].append(differing(decided, judge.decisions(simulated)) if judge else None)
        with listening(model, lowered, _comparer(verdict.simulated, computed)):
            simulated = model(images).cpu()
        gaps["simulated"].append(differing(decided, judge.decisions(simulated)) if judge else None)
        verdict.images += len(images)
        judging.add(outputs, targets)
    verdict.predictions, verdict.score = {name: total(counts) for name, counts in gaps.items()}, judging.score
    return verdict


def _keeper(computed: dict[str, Tensor], watched: set[str]) -> Take:
    def keep(name: str, codes: Tensor) -> None:
        if name in watched:
            computed[name] = codes

    return keep


def _comparer(counts: dict[str, Compared], computed: dict[str, Tensor]) -> Take:
    def compare(name: str, codes: Tensor) -> None:
        counts.setdefault(name, Compared()).take(codes.cpu(), computed[name])

    return compare


def _against_the_definition(
    verdict: Verdict, lowered: Lowered, codes: Tensor, computed: dict[str, Tensor], scores: Tensor
) -> None:
    """Runs some images through the NumPy executor and counts the codes in which the fast one differs."""

    def keep(name: str, expected: Any) -> None:
        if name in computed:
            verdict.reference_differ += int((torch.from_numpy(expected) != computed[name][: len(codes)].long()).sum())

    expected = Reference(lowered.program).run(codes.numpy(), keep)
    verdict.reference = len(codes)
    verdict.reference_differ += int((torch.from_numpy(expected) != scores[: len(codes)]).sum())


@contextmanager
def listening(model: nn.Module, lowered: Lowered, take: Take) -> Iterator[None]:
    """Context manager: calls `take(tensor, codes)` with the codes of every quantizer of the unchanged network."""
    heard: dict[int, list[tuple[str, str, Site]]] = {}
    for (name, site), here in lowered.sites.items():
        if here.quantized:
            heard.setdefault(id(model.get_submodule(name).site(site)), []).append((name, site, here))
    with ExitStack() as stack:
        stack.enter_context(evaluating(model))
        for places in heard.values():
            for name, site, here in places:
                layer = model.get_submodule(name)
                inner = layer.site(site)
                if len(places) == 1:
                    stack.callback(inner.register_forward_pre_hook(_hears(take, here)).remove)
                else:  # a quantizer on several tensors: each tensor gets its own wrapper
                    stack.callback(setattr, layer, attribute(site), inner)
                    setattr(layer, attribute(site), _Ear(inner, here, take))
        yield


def _hears(take: Take, here: Site) -> Callable[[nn.Module, tuple], None]:
    def hook(quantizer: nn.Module, args: tuple) -> None:
        take(here.tensor, here.place.inside(quantizer.codes(args[0]), here.leaving.shape))

    return hook


class _Ear(nn.Module):
    """Wraps a quantizer and passes its codes to a callback."""

    def __init__(self, inner: nn.Module, here: Site, take: Take) -> None:
        super().__init__()
        self.inner, self.here, self.take = inner, here, take

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:  # any attribute that a layer reads from its quantizer
            return getattr(super().__getattr__("inner"), name)

    def forward(self, x: Tensor) -> Tensor:
        self.take(self.here.tensor, self.here.place.inside(self.inner.codes(x), self.here.leaving.shape))
        return self.inner(x)
