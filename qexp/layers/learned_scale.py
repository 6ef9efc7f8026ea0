"""Binary layers whose result is multiplied by a learned tensor, instead of scales measured on weights and inputs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from qexp.errors import QexpError
from qexp.layers.quantized import QuantConv2d, Quantized, QuantLinear

_SCALES = ("rank1", "out", "out_space", "dense")


class _LearnedScale(Quantized):
    """A layer that multiplies its result, before the bias, by a learned tensor G.

    `out`: one factor per output channel, alpha. `rank1`: `alpha_o beta_h gamma_w`. `out_space`: `alpha_o B_hw`. `dense`: `G_ohw`. alpha
    starts at the mean magnitude of its filter, the others at 1 (for `dense`, G starts at alpha). Gradients are those of the product. The
    forms with spatial factors fix the size of the images. The weights must be signs (`BWN` with `scaled: false`).

    Source: Bulat, Tzimiropoulos 2019, "XNOR-Net++" (arXiv 1909.13863), section 3.2.
    """

    scale_form: str = "rank1"

    def configure(self, scale: Literal["rank1", "out", "out_space", "dense"] = "rank1", **options: Any) -> None:
        """Sets the form of G."""
        super().configure(**options)
        if scale not in _SCALES:
            raise QexpError(f"compute.scale={scale!r} is not allowed; use {', '.join(_SCALES)}")
        self.scale_form = scale if isinstance(self, nn.Conv2d) else "out"

    def shaped(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        height, width = shapes["output"][-2:]
        start = self.weight.detach().float().abs().flatten(1).mean(1)
        channels = start.reshape(-1, 1, 1) if isinstance(self, nn.Conv2d) else start
        made = {
            "out": {"gain_out": channels},
            "rank1": {
                "gain_out": channels,
                "gain_height": torch.ones(height, 1, device=start.device),
                "gain_width": torch.ones(width, device=start.device),
            },
            "out_space": {"gain_out": channels, "gain_space": torch.ones(height, width, device=start.device)},
            "dense": {"gain": channels.expand(-1, height, width).clone() if channels.ndim == 3 else channels},
        }[self.scale_form]
        for name, value in made.items():
            setattr(self, name, nn.Parameter(value))
        self.learns = tuple(made)

    def gains(self) -> Tensor:
        """Returns G, which broadcasts against one sample of the result."""
        product = getattr(self, self.learns[0])
        for name in self.learns[1:]:
            product = product * getattr(self, name)
        return product

    def forward(self, x: Tensor) -> Tensor:
        if not self.enabled:
            return self.float_class.forward(self, x)
        y, g = self.compute(self.input_quantizer(x), self.quantized_weight(), None), self.gains()
        if g.ndim == 3 and g.shape[1:] not in ((1, 1), y.shape[2:]):
            raise QexpError(
                f"{self.float_class.__name__}: scale={self.scale_form} was built for results of size {list(g.shape[1:])}, got "
                f"{list(y.shape[2:])}; use images of one size, or scale: out"
            )
        bias = self.quantized_bias()
        y = y * g
        if bias is not None:
            y = y + (bias.reshape(-1, 1, 1) if isinstance(self, nn.Conv2d) else bias)
        return self.finish(y)


class LearnedScaleConv2d(_LearnedScale, QuantConv2d): ...


class LearnedScaleLinear(_LearnedScale, QuantLinear): ...


LEARNED_SCALE: dict[type[nn.Module], type[Quantized]] = {nn.Conv2d: LearnedScaleConv2d, nn.Linear: LearnedScaleLinear}
