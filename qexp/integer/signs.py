"""Signs of activations: two levels, decided at a threshold per channel, as comparisons of whole numbers."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from qexp.integer.grids import cannot
from qexp.integer.products import Affine
from qexp.integer.program import Requantize
from qexp.integer.values import ZERO, Value, Writer
from qexp.quantizers.base import Quantizer

Reals = NDArray[np.float64]
PROBE = 1e-4  # distance from a threshold at which a quantizer is asked for its codes


@dataclass(frozen=True)
class Signs:
    """A quantizer to `-level` and `level`: the upper one from `threshold` on; one number each, or one per channel."""

    threshold: Reals
    level: Reals


@torch.no_grad()
def signs_of(quantizer: Quantizer, where: str) -> Signs | None:
    """Returns the threshold and the level of a quantizer to two opposite levels; None for any other.

    Raises:
        QexpError: Its codes do not change at its threshold.
    """
    zero = torch.as_tensor(quantizer.zero_point)
    if quantizer.bits != 1 or not bool((zero == 0.5).all()) or quantizer.gain is not None:
        return None
    quantizer.require_ready()
    threshold = getattr(quantizer, "theta", None)
    threshold = torch.zeros(1) if threshold is None else threshold.detach().cpu().double().flatten()
    level = torch.as_tensor(quantizer.scale).detach().cpu().double().flatten() / 2
    found = Signs(*(v[:1] if (v == v[0]).all() else v for v in (threshold.numpy(), level.numpy())))
    if not _decides(quantizer, found):
        raise cannot(where, f"{type(quantizer).__name__} decides elsewhere than at its threshold", "use quant=reactnet")
    return found


def _decides(quantizer: Quantizer, signs: Signs) -> bool:
    """Whether the codes change from 0 to 1 at the threshold, and mean the two levels."""
    axis = quantizer.granularity.axis
    channels = 1 if axis is None else quantizer.shape[axis]
    spread = [1, channels, *[1] * (len(quantizer.shape) - 2)]
    place, level = (np.broadcast_to(v, (channels,)).reshape(spread) for v in (signs.threshold, signs.level))
    reach = PROBE * (1 + np.abs(place))
    below, above = (torch.from_numpy((place + side * reach).astype(np.float32)) for side in (-1, 1))
    codes = [quantizer.codes(x) for x in (below, above)]
    values = [quantizer.dequantize(c).double().numpy() for c in codes]
    right = bool((codes[0] == 0).all() and (codes[1] == 1).all())
    return right and all(np.allclose(v, sign * level) for v, sign in zip(values, (-1, 1)))


def compared(writer: Writer, signs: Signs, x: Value, layer: str, name: str) -> tuple[Value, Value, Requantize]:
    """Returns the signs of a value as their levels, their codes 0 and 1 as the network's quantizer has them, and the comparison.

    A whole number `q` reaches the threshold from `t = ceil(threshold / unit)` on: its code is `clip(q - t + 1, 0, 1)`.
    """
    least = np.ceil(signs.threshold / x.unit - 2.0**-30)  # a threshold on a step counts as this step
    least = np.clip(least, -x.reach - 1, x.reach + 1).astype(np.int64)
    axis = x.axis_of(1) if least.size > 1 else x.axis
    if axis is None or (axis != x.axis and not x.uniform):
        raise cannot(
            name, "its channels have scales along another dimension than its thresholds", "use granularity: tensor"
        )
    codes = writer.fresh(name)
    one = np.ones(1, np.int64)
    op = Requantize(
        layer=layer,
        inputs=(x.tensor,),
        output=codes,
        multiplier=one,
        addend=one - least,
        shift=ZERO,
        zero=x.zero,
        rounding="half_even",
        low=0,
        high=1,
        axis=axis,
    )
    below = writer.apply(op, x, np.ones(1), ZERO)
    spread = (1,) * len(x.shape)
    levels = Affine(
        layer=layer,
        inputs=(codes,),
        output=writer.fresh(f"{name}.levels"),
        factor=one.reshape(spread),
        bias=-one.reshape(spread),
        zero=ZERO,
        shift=1,
    )
    leaving = Value(codes, 2 * signs.level, np.full(1, 0.5), 0, 1, x.shape)
    made = writer.emit(levels, Value(levels.output, signs.level, ZERO, -1, 1, below.shape))
    return made, leaving, op
