"""The contract of a quantizer, checked on tensors as quantizers meet them, ugly ones included."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from qexp.calibration.site_stats import SiteStats
from qexp.errors import QexpError
from qexp.numerics.granularity import PerChannel, granularity
from qexp.quantizers.base import Quantizer
from qexp.statistics.stats import TensorStats
from qexp.system.objects import find, make

SHAPES = {"weight": (4, 3, 3, 3), "bias": (6,)}
ACTIVATION = (4, 3, 5, 5)
CONSTANTS = {"weight": 0, "bias": 0}  # axis of the channels; 1 for activations
EXPLAINED = {  # each property, with the word by which a docstring says why it does not hold
    "idempotent": "idempotent",
    "monotone": "monoton",
    "half_step": "half a step",
    "needs_calibration": "calibrat",
}


def faults(spec: Mapping[str, Any], site: str) -> Iterator[str]:
    """Yields a sentence for each part of the contract that a quantizer breaks.

    Args:
        spec: Its specification in a recipe: `_target_`, `granularity`, arguments.
        site: The tensor it sits on: `input`, `weight`, `bias`, `output`.
    """
    kind = find(spec)
    if not (isinstance(kind, type) and issubclass(kind, Quantizer)):
        yield f"{spec['_target_']} is no subclass of qexp.quantizers.base.Quantizer"
        return
    low, high = kind.bits_allowed
    for bits in sorted({max(low, 2) if high > 1 else low, min(max(4, low), high), min(max(8, low), high)}):
        for name, x in tensors(site):
            try:
                q = fitted(spec, bits, x, site)
                broken = next(_broken(q, x, spec, bits, site), None)
            except Exception as error:
                broken = f"raises {type(error).__name__}: {error}"
            if broken:
                yield f"{kind.__name__} on {site} at {bits} bits, {name} tensor: {broken}"
                return  # one fault at a time: others often follow from it
    yield from _refusals(kind, spec, site)
    said = " ".join((kind.__doc__ or "").split()).lower()
    for promise, word in EXPLAINED.items():
        if promise not in kind.properties and word not in said:
            yield f"{kind.__name__} does not promise {promise}, and its docstring does not say why ({word!r})"


def tensors(site: str) -> Iterator[tuple[str, Tensor]]:
    """Yields float32 tensors with what they are: bell-shaped, one-sided, with ties, constant, zero, tiny, with one far value."""
    shape, random = SHAPES.get(site, ACTIVATION), torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=random)
    yield "bell-shaped", x
    yield "positive", x.abs() + 1e-3
    yield "negative", -x.abs() - 1e-3
    yield "half zero", x.clamp(min=0)
    yield "tied", (x * 4).round() / 4
    yield "denormal", x * 1e-41
    yield "constant", torch.full(shape, 0.37)
    yield "zero", torch.zeros(shape)
    far = x * 1e-3
    far.view(-1)[1] = 50.0
    yield "one-spike", far


def built(spec: Mapping[str, Any], bits: int, x: Tensor, site: str) -> Quantizer:
    """Returns the quantizer of a recipe's specification for a tensor, not yet fitted."""
    axis = CONSTANTS.get(site, 1)
    spec = {key: value for key, value in spec.items() if key not in ("bits", "share")}
    shared = granularity(spec.pop("granularity", "tensor"), axis)
    shape = tuple(x.shape) if axis == 0 else (1, *x.shape[1:])
    return make(spec, as_partial=True)(bits=bits, shape=shape, granularity=shared)


def fitted(spec: Mapping[str, Any], bits: int, x: Tensor, site: str) -> Quantizer:
    """Returns the quantizer, fitted on the tensor as calibration fits it."""
    q = built(spec, bits, x, site)
    fit(q, x, site)
    return q


def fit(q: Quantizer, x: Tensor, site: str) -> None:
    """Fits a quantizer on its tensor as calibration fits it, in place."""
    if site in CONSTANTS:
        q.fit(TensorStats.of(x, q.granularity))
        return
    seen = SiteStats(channel=TensorStats(PerChannel(1), 512))
    seen.update(x, q.collectors)
    stats = seen.tensor if q.granularity.axis is None else seen.channel
    stats.extra = seen.extra
    q.fit(stats)


def _broken(q: Quantizer, x: Tensor, spec: Mapping[str, Any], bits: int, site: str) -> Iterator[str]:
    """Yields what a fitted quantizer does wrong with its own tensor."""
    yield from wrong_values(q, x)
    yield from broken_promises(q, x)
    yield from lost_state(q, built(spec, bits, x, site), x)
    yield from wrong_gradients(q, x)


def wrong_values(q: Quantizer, x: Tensor) -> Iterator[str]:
    """Yields what is wrong with the values and codes that a fitted quantizer makes of a tensor."""
    before, state = x.clone(), copy.deepcopy(q.state_dict())
    y, codes = q(x), q.codes(x)
    if y.shape != x.shape or y.dtype != x.dtype:
        yield f"forward returns {y.dtype} {list(y.shape)} for {x.dtype} {list(x.shape)}"
        return
    if not bool(torch.isfinite(y).all()):
        yield "forward returns NaN or infinity"
    if not torch.equal(x, before):
        yield "forward changes its input in place"
    if not torch.equal(codes.float(), codes.float().round()):
        yield "codes are not whole numbers"
    rows = q.granularity.rows
    least, most = (_per_row(limit, len(rows(x))) for limit in q.limits)
    if not bool(((rows(codes) >= least) & (rows(codes) <= most)).all()):
        yield f"codes leave the limits {q.limits}"
    if not torch.equal(q.dequantize(codes).to(y.dtype), y):
        yield "forward(x) differs from dequantize(codes(x))"
    if any(len(row.unique()) > q.levels for row in rows(y.detach())):
        yield f"forward returns more than its {q.levels} levels"
    if not torch.equal(q(x), y):
        yield "a second call returns something else"
    after = q.state_dict()
    if "needs_calibration" in q.properties and not all(torch.equal(after[k], v) for k, v in state.items()):
        yield "forward changes its scales or other state"


def broken_promises(q: Quantizer, x: Tensor) -> Iterator[str]:
    """Yields each of its declared properties that a fitted quantizer does not have on a tensor."""
    y = q(x)
    xr, yr = (q.granularity.rows(t.detach()).double() for t in (x, y))
    if "idempotent" in q.properties and not torch.equal(q(y), y):
        yield "it promises idempotent, and quantizes its own result to something else"
    if "monotone" in q.properties and not bool((yr.gather(1, xr.argsort(dim=1)).diff(dim=1) >= 0).all()):
        yield "it promises monotone, and orders two values the other way"
    if "half_step" in q.properties:
        scale, zero = _per_row(q.scale, len(xr)), _per_row(q.zero_point, len(xr))
        low, high = ((_per_row(limit, len(xr)) - zero) * scale for limit in q.limits)
        inside = (xr >= low) & (xr <= high)
        rounded = 2.0**-23 * xr.abs()  # what float32 makes of a value that is millions of steps from zero
        if not bool(((xr - yr).abs() <= 0.5002 * scale + rounded)[inside].all()):
            yield "it promises half_step, and has an error of more than half a step inside its range"


def lost_state(q: Quantizer, fresh: Quantizer, x: Tensor) -> Iterator[str]:
    """Yields each way to carry a quantizer's state that loses some of it or shares it; `fresh` is the same one, not yet fitted."""
    q, y = copy.deepcopy(q), q(x)
    buffer = io.BytesIO()
    torch.save(q.state_dict(), buffer)
    buffer.seek(0)
    fresh.load_state_dict(torch.load(buffer, weights_only=True), strict=True)
    twin, pickled = copy.deepcopy(q), pickle.loads(pickle.dumps(q))
    with torch.no_grad():
        for t in [*q.parameters(), *q.buffers()]:
            if t.is_floating_point():
                t.mul_(3)  # what follows from it must not reach the others
    for how, other in (("loaded from its state_dict", fresh), ("copied", twin), ("pickled", pickled)):
        if not torch.equal(other(x), y):
            yield f"{how} it returns something else"
        limits = zip(other.limits, twin.limits)
        if other.describe() != twin.describe() or not all(torch.equal(*map(torch.as_tensor, pair)) for pair in limits):
            yield f"{how} it describes itself otherwise"


def wrong_gradients(q: Quantizer, x: Tensor) -> Iterator[str]:
    """Yields each gradient that a fitted quantizer does not give, or gives as NaN or infinity."""
    x = x.detach().clone().requires_grad_()
    (q(x) * torch.linspace(-1, 1, x.numel()).reshape(x.shape)).sum().backward()
    learned = {f"of its parameter {name}": p for name, p in q.named_parameters() if p.requires_grad}
    for name, t in {"of its tensor": x, **learned}.items():
        if t.grad is None or not bool(torch.isfinite(t.grad).all()):
            yield f"the gradient {name} is missing or not finite"


def _refusals(kind: type[Quantizer], spec: Mapping[str, Any], site: str) -> Iterator[str]:
    _, x = next(tensors(site))
    bits = min(max(4, kind.bits_allowed[0]), kind.bits_allowed[1])
    for wrong in (0, 17, 2.5):
        try:
            built(spec, wrong, x, site)
            yield f"{kind.__name__} takes bits={wrong}; pass the constructor's arguments on to Quantizer"
        except QexpError:
            pass
    if "needs_calibration" not in kind.properties:
        return
    try:
        built(spec, bits, x, site)(x)
        yield f"{kind.__name__} can be used before calibration; call self.require_ready() in forward and codes"
    except QexpError:
        pass


def _per_row(value: Any, rows: int) -> Tensor:
    value = torch.as_tensor(value, dtype=torch.float64).detach().flatten()
    return (value if value.numel() == rows else value.expand(rows))[:, None]
