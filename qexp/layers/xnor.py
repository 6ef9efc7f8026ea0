"""XNOR layers: signs times signs, multiplied by the local mean magnitude of the input."""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qexp.errors import QexpError
from qexp.layers.quantized import QuantConv2d, Quantized, QuantLinear

_SCALES = ("map", "none")


class _Xnor(Quantized):
    """A layer that multiplies its result, before the bias, by K, the mean magnitude of the raw input in each output's window.

    K receives no gradient: the gradient of the input is that of its binary quantizer alone.

    Source: Rastegari et al. 2016 (arXiv 1603.05279), section 3.2, equation 11.
    Differs from the paper: each group has its own K; the border uses the convolution's own padding.
    """

    input_scale: str = "map"

    def configure(self, input_scale: Literal["map", "none"] = "map", **options: Any) -> None:
        """Sets `input_scale`: `map` multiplies by K; `none` does not, as in most re-implementations."""
        super().configure(**options)
        if input_scale not in _SCALES:
            raise QexpError(f"{type(self).__name__}: input_scale={input_scale!r}; allowed are {', '.join(_SCALES)}")
        self.input_scale = input_scale

    def magnitude(self, x: Tensor) -> Tensor:
        """Returns K, which broadcasts against the result."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        if not self.enabled or self.input_scale == "none":
            return super().forward(x)
        y = self.compute(self.input_quantizer(x), self.quantized_weight(), None)
        y = y * self.magnitude(x.detach())
        bias = self.quantized_bias()
        if bias is not None:
            y = y + bias.reshape(-1, *[1] * (y.ndim - 2)) if isinstance(self, nn.Conv2d) else y + bias
        return self.finish(y)


class XnorConv2d(_Xnor, QuantConv2d):
    def magnitude(self, x: Tensor) -> Tensor:
        """Returns K `[N, C_out or 1, H', W']` of `x` `[N, C, H, W]`: channel means of |x|, box-filtered as the convolution strides."""
        n, _, height, width = x.shape
        means = x.abs().reshape(n, self.groups, -1, height, width).mean(2)
        if self.padding_mode != "zeros":
            means, padding = F.pad(means, self._reversed_padding_repeated_twice, mode=self.padding_mode), 0
        else:
            padding = self.padding
        taps = self.kernel_size[0] * self.kernel_size[1]
        box = torch.full((self.groups, 1, *self.kernel_size), 1 / taps, dtype=x.dtype, device=x.device)
        k = F.conv2d(means, box, None, self.stride, padding, self.dilation, self.groups)
        return k if self.groups == 1 else k.repeat_interleave(self.out_channels // self.groups, 1)


class XnorLinear(_Xnor, QuantLinear):
    def magnitude(self, x: Tensor) -> Tensor:
        """Returns K `[..., 1]` of `x` `[..., features]`: the mean of |x|."""
        return x.abs().mean(-1, keepdim=True)


XNOR: dict[type[nn.Module], type[Quantized]] = {nn.Conv2d: XnorConv2d, nn.Linear: XnorLinear}
