"""Cross-layer equalization: makes the weight ranges of consecutive layers equal, channel by channel."""

from __future__ import annotations

import logging
from collections import Counter
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from qexp.errors import QexpError
from qexp.layers.quantized import WEIGHTED, float_class
from qexp.layers.swap import evaluating
from qexp.layers.weight_channels import channels, input_range, output_range, response, scale_inputs, scale_outputs
from qexp.network.facts import Facts, facts
from qexp.passes.base import Pass, PassContext
from qexp.passes.tied import tied_with

log = logging.getLogger(__name__)

# modules that a positive factor passes through unchanged
_HOMOGENEOUS = (
    *(nn.Identity, nn.Dropout, nn.Dropout2d, nn.ReLU, nn.LeakyReLU, nn.PReLU, nn.Flatten),
    *(nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d),
)
_HOMOGENEOUS_NAMES = {
    f"{name}()"
    for name in ("relu", "relu_", "leaky_relu", "prelu", "dropout", "dropout2d", "flatten", "max_pool2d", "avg_pool2d")
} | {"adaptive_avg_pool2d()", "contiguous()"}


class ClippedReLU(nn.Module):
    """`clip(x, 0, bound)` with one bound per channel: replaces a ReLU6 between equalized layers.

    Args:
        bound: In a shape that broadcasts against the tensor, such as `[C, 1, 1]`.
    """

    def __init__(self, bound: Tensor) -> None:
        super().__init__()
        self.register_buffer("bound", bound)

    def forward(self, x: Tensor) -> Tensor:
        return torch.minimum(torch.relu(x), self.bound)


@dataclass
class Pair:
    """Two consecutive layers and the ReLU6s between them."""

    first: str
    second: str
    relu6: tuple[str, ...]


class Equalize(Pass):
    """Scales output channel i of a layer by `1/s_i` and its weights in the next layer by `s_i`, with `s_i = sqrt(r1_i / r2_i)`.

    `r1_i` is the largest magnitude of the first layer's weights of that channel, `r2_i` of the second's; afterwards both are
    `sqrt(r1_i r2_i)`. All pairs are swept until every factor is within `tolerance` of 1. Pairs come from the graph: weighted layers
    with only modules between them that a positive factor passes through (ReLU, PReLU, leaky ReLU, pooling, flattening), and no branch.
    Depthwise layers are in two pairs. A channel of zeros in either layer keeps its factor 1.

    Args:
        sweeps: Largest number of sweeps over all pairs.
        tolerance: Distance of the factors from 1 at which the sweeps end.
        relu6: Treatment of a ReLU6 between two layers: `relu` replaces it, as published, which changes clipped values; `clip` gives
            it a bound for each channel, which keeps the results; `skip` skips the pair.
        absorb: Move `c = max(0, beta - 3 gamma)` of each channel, from the folded batch norm, out of the first layer's bias into the
            second's, so that few large values widen its input. Exact where the input exceeds c, away from padded borders.

    Source: Nagel et al. 2019 (arXiv 1906.04721), equations 7-12 and section 4.2.
    """

    def __init__(
        self,
        sweeps: int = 20,
        tolerance: float = 1e-3,
        relu6: Literal["relu", "clip", "skip"] = "relu",
        absorb: bool = False,
    ) -> None:
        if relu6 not in ("relu", "clip", "skip"):
            raise QexpError(f"Equalize(relu6={relu6!r}) is not allowed; use relu, clip or skip")
        if sweeps < 1 or tolerance <= 0:
            raise QexpError(
                f"Equalize(sweeps={sweeps}, tolerance={tolerance}) is not allowed; use sweeps >= 1 and tolerance > 0"
            )
        self.sweeps, self.tolerance, self.relu6, self.absorb = sweeps, tolerance, relu6, absorb
        self.keeps_results = not absorb  # and where a ReLU6 becomes a ReLU, which `on_float` finds out

    @torch.no_grad()
    def on_float(self, model: nn.Module, context: PassContext) -> None:
        """Equalizes in place; reports pairs, sweeps, channels of zeros, and the change of the network's results."""
        pairs, refused = find_pairs(model, context.facts, self.relu6 != "skip")
        for reason, count in Counter(refused.values()).items():
            log.info("equalize: %d layers are not scaled: %s", count, reason)
        if not pairs:
            reasons = "; ".join(sorted(set(refused.values()))) or context.facts.trace_error or "one layer only"
            raise QexpError(f"equalization found no pair of layers it may scale: {reasons}")
        self.keeps_results = not self.absorb and not (self.relu6 == "relu" and any(pair.relu6 for pair in pairs))
        images = context.images[0]
        with evaluating(model):
            before = model(images)
            for pair in pairs:
                self._free(model, pair)
            total = {p.first: torch.ones(channels(model.get_submodule(p.first))[0], dtype=torch.float64) for p in pairs}
            done, largest = 0, float("inf")
            while done < self.sweeps and largest >= self.tolerance:
                largest = max(self._even_out(model, p, total[p.first]) for p in pairs)
                done += 1
            for pair in pairs:
                self._settle(model, pair, total[pair.first], context)
            absorbed = sum(_absorb(model, p, context) for p in pairs) if self.absorb else 0
            change = float((model(images) - before).norm() / before.norm().clamp_min(1e-30))
        if any(pair.relu6 for pair in pairs):
            context.facts = facts(model, images[:1])  # other modules stand there now
        dead = sum(int((_ranges(model, p).amin(0) == 0).sum()) for p in pairs)
        log.info(
            "equalize: %d pairs in %d sweeps (largest factor left %.2g), %d channels of zeros, results moved by %.2g",
            *(len(pairs), done, largest, dead, change),
        )
        context.findings |= {"equalized_pairs": len(pairs), "equalize_sweeps": done, "equalize_change": change}
        context.findings |= {"equalize_dead": dead} | ({"absorbed_biases": absorbed} if self.absorb else {})

    def _free(self, model: nn.Module, pair: Pair) -> None:
        """Replaces a pair's ReLU6s by clamps with one bound per channel, which start at 6 and can be scaled."""
        for name in pair.relu6:
            weight = model.get_submodule(pair.first).weight
            bound = weight.new_full((channels(model.get_submodule(pair.first))[0], *[1] * (weight.ndim - 2)), 6.0)
            _put(model, name, nn.ReLU() if self.relu6 == "relu" else ClippedReLU(bound))

    def _even_out(self, model: nn.Module, pair: Pair, total: Tensor) -> float:
        """Scales one pair, multiplies its factors into `total` `[C]`, and returns the largest distance of a factor from 1."""
        r1, r2 = _ranges(model, pair).double()
        s = torch.where((r1 > 0) & (r2 > 0), torch.sqrt(r1 / torch.where(r2 > 0, r2, 1.0)), 1.0)
        scale_outputs(model.get_submodule(pair.first), 1 / s)
        scale_inputs(model.get_submodule(pair.second), s)
        total *= s.to(total.device)
        return float((s - 1).abs().max())

    def _settle(self, model: nn.Module, pair: Pair, total: Tensor, context: PassContext) -> None:
        """Scales the bounds and the known distributions of the first layer's results by its factors."""
        if pair.first in context.folded:
            normal = context.folded[pair.first]
            normal.mean, normal.std = (t / total.to(t) for t in (normal.mean, normal.std))
        for name in pair.relu6:
            if self.relu6 == "clip":
                bound = model.get_submodule(name).bound
                bound /= total.to(bound).reshape(bound.shape)


def find_pairs(model: nn.Module, structure: Facts, relu6: bool = True) -> tuple[list[Pair], dict[str, str]]:
    """Returns the pairs of layers that can be equalized, in order of execution, and the reason for each other weighted layer.

    Args:
        model: Float network.
        structure: Facts of its graph.
        relu6: Whether a ReLU6 may stand between them.
    """
    if structure.trace_error:
        raise QexpError(
            f"equalization needs to know which layers follow each other, but the model cannot be traced ({structure.trace_error})"
        )
    pairs, refused = [], {}
    for name in (n for n in structure.order if isinstance(model.get_submodule(n), WEIGHTED)):
        between, clipped = structure.chains.get(name, ())[:-1], []
        if name not in structure.chains:
            if name != structure.last:
                refused[name] = "their results branch, meet another tensor, or end in the network's result"
            continue
        second = structure.chains[name][-1]
        for part in between:
            module = None if part.endswith("()") else model.get_submodule(part)
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                refused[name] = "a batch norm follows (fold it with bn=fold)"
            elif isinstance(module, nn.ReLU6) and relu6 and _used_once(structure, part):
                clipped.append(part)
            elif isinstance(module, nn.ReLU6) or part == "relu6()":
                refused[name] = "a ReLU6 follows" + (
                    " that is a function or shared, not a module of its own" if relu6 else ""
                )
            elif not (isinstance(module, _HOMOGENEOUS) or part in _HOMOGENEOUS_NAMES):
                what = part if module is None else type(module).__name__
                refused[name] = f"{what} follows, which no factor passes through"
        count, incoming = channels(model.get_submodule(name))[0], channels(model.get_submodule(second))[1]
        if name not in refused and (
            incoming % count or (incoming > count and not isinstance(model.get_submodule(second), nn.Linear))
        ):
            refused[name] = f"{count} channels do not map onto {incoming} inputs"
        if name not in refused and (reason := _not_channels(model, structure, name, second)):
            refused[name] = reason
        shared = [n for n in (name, second) if tied_with(model, n)]
        if name not in refused and shared:
            refused[name] = f"{shared[0]} shares its weight or bias with another layer"
        if name not in refused:
            pairs.append(Pair(name, second, tuple(clipped)))
    return pairs, refused


def _not_channels(model: nn.Module, structure: Facts, first: str, second: str) -> str:
    """Returns why the output channels of one layer are not the input channels of the next one, by shapes; "" if they are."""
    leaving, entering = structure.shapes[first]["output"], structure.shapes[second]["input"]
    count, incoming = channels(model.get_submodule(first))[0], channels(model.get_submodule(second))[1]
    linear = [issubclass(float_class(model.get_submodule(n)), nn.Linear) for n in (first, second)]
    if all(linear):
        same = leaving[:-1] == entering[:-1] and count == incoming
        mixed = len(leaving) > 2 and any(_spatial(model, part) for part in structure.chains[first][:-1])
        return "" if same and not mixed else "features are flattened or pooled together with positions"
    if linear[0]:
        return "features of a linear layer meet a convolution"
    if linear[1]:
        flat = len(entering) == 2 and entering[0] == leaving[0]
        return "" if flat else "a linear layer follows that weighs positions, not channels"
    return "" if entering[:2] == leaving[:2] else "channels are rearranged before the next layer"


def _spatial(model: nn.Module, part: str) -> bool:
    """Whether the modules between two layers work on other dimensions than the first two."""
    known = (nn.Identity, nn.Dropout, nn.ReLU, nn.ReLU6, nn.LeakyReLU)
    return (
        "pool" in part or "flatten" in part if part.endswith("()") else not isinstance(model.get_submodule(part), known)
    )


def _used_once(structure: Facts, name: str) -> bool:
    return sum(name in chain for chain in structure.chains.values()) == 1 and structure.calls.get(name, 0) == 1


def _ranges(model: nn.Module, pair: Pair) -> Tensor:
    """Returns `r1` and `r2` of each channel between the two layers, `[2, C]`."""
    r1 = output_range(model.get_submodule(pair.first))
    return torch.stack([r1, input_range(model.get_submodule(pair.second), len(r1))])


def _absorb(model: nn.Module, pair: Pair, context: PassContext) -> int:
    """Moves each channel's lower bound from the first layer's bias into the second's; returns the number of channels moved."""
    normal = context.folded.get(pair.first)
    between = context.facts.chains[pair.first][:-1]
    plain = all(
        part == "relu()" if part.endswith("()") else isinstance(model.get_submodule(part), nn.Identity | nn.ReLU)
        for part in between
    )
    if normal is None or not plain or pair.first not in context.facts.followed_by_relu:
        return 0  # only a ReLU keeps a lower bound of its input
    first, second = model.get_submodule(pair.first), model.get_submodule(pair.second)
    c = (normal.mean - 3 * normal.std).clamp_min(0)
    first.bias.sub_(c.to(first.bias))
    shift = response(second, second.weight, c).to(second.weight)
    if second.bias is None:
        second.bias = nn.Parameter(shift)
    else:
        second.bias.add_(shift)
    normal.mean = normal.mean - c
    return int((c > 0).sum())


def _put(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, module.train(model.get_submodule(name).training))
