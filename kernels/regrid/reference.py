"""The steps of a pass in plain PyTorch: the reference for every other implementation."""

import torch
from torch import Tensor

from ..layout import along
from ..round_to.reference import round_to

FORMS = (torch.float32, torch.float64, torch.uint8)
TABLE, GRID, SCALED = "table", "grid", "scaled"
KINDS = ("half_even", "half_up", "half_away", "floor", "trunc", "none", "float32", TABLE, GRID, SCALED)


def forward(
    xs: list[Tensor], constants: list[Tensor], tables: list[Tensor], steps: list[int], forms: list[int]
) -> list[Tensor]:
    """Returns the results of the steps, each `kind, source, other, target, at`."""
    places: dict[int, Tensor] = dict(enumerate(xs))
    kinds = [FORMS[f] for f in forms]
    for i in range(0, len(steps), 5):
        kind, source, other, target, at = steps[i : i + 5]
        between = torch.float32 if KINDS[kind] == SCALED else torch.uint8
        dtype = kinds[target - len(xs)] if target - len(xs) < len(kinds) else between
        if KINDS[kind] == TABLE:
            index = places[source].long()
            index = index * 256 + places[other].long() if other >= 0 else index
            places[target] = tables[at][index]
        else:
            places[target] = _mapped(places[source], places.get(other), constants[at], KINDS[kind]).to(dtype)
    outs = [torch.empty_like(xs[0], dtype=dtype) for dtype in kinds]
    return [out.copy_(places[len(xs) + i]) for i, out in enumerate(outs)]


def _mapped(x: Tensor, other: Tensor | None, constants: Tensor, kind: str) -> Tensor:
    axis = 1 if x.dim() > 1 else None
    factor, summand, low, high, after, second = (along(row.contiguous(), x, axis) for row in constants)
    if kind == GRID:
        return torch.clamp(x.float() / factor.float() + summand.float(), low.float(), high.float()).round() + after
    if kind == SCALED:
        y = x.float() * second.float() * factor.float() + summand.float()
        y = y if other is None else y + other
        return torch.clamp(y, low.float(), high.float())
    if kind == "float32":
        y = (x.float() * factor.float()).double().round()
    else:
        y = x.double() * factor
        y = (y if other is None else y + other.double() * second) + summand
        y = y if kind == "none" else round_to(y, kind, None)
    return torch.minimum(torch.maximum(y, low), high) + after
