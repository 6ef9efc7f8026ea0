"""Convolutions and linear layers that round after every operation, as a datapath with one word length does."""

from __future__ import annotations

import torch.nn.functional as F
from qexp_kernels import fixed_point_conv2d, fixed_point_linear
from torch import Tensor, nn

from qexp.errors import QexpError
from qexp.layers.quantized import QuantConv1d, QuantConv2d, QuantConv3d, QuantConvTranspose2d, Quantized, QuantLinear
from qexp.quantizers.fixed_point import FixedPoint

ACCUM = ("exact", "per_op", "per_add")


class PerProduct(Quantized):
    """A layer that rounds its products, sums and bias additions to the format of its output.

    Q is the layer's output quantizer. `exact` computes `Q(sum_k w_k x_k + b)`. `per_op` computes `Q(Q(sum_k Q(w_k x_k)) + b)`: each
    product is rounded and saturated; the sum of the rounded products is exact and then rounded once. `per_add` also rounds every partial
    sum, in the order input channel, row, column. No tensor of products is stored. The gradient is that of the float operation.

    Source: the arithmetic of imagenet-cnn-quantization (`per_op` is that of its convolutions; its linear layers round only the final sum).
    Differs from the source: products are exact (float64). The source's float32 products can cross a tie by one last digit, which changes
    1 to 4 codes of 4,608 at 12 to 16 bits.
    """

    _accum = "per_op"

    def configure(self, accum: str = "per_op") -> None:
        """Sets the rounding points: `exact`, `per_op` or `per_add`."""
        if accum not in ACCUM:
            raise QexpError(f"compute.accum={accum!r}; allowed are {', '.join(ACCUM)}")
        q = self.output_quantizer
        if accum != "exact" and not (isinstance(q, FixedPoint) and q.scale.numel() == 1 and q.bits >= 2):
            raise QexpError(
                f"compute.accum={accum} rounds each product to the format of the layer's output, which must be a FixedPoint quantizer "
                f"of one scale and at least 2 bits; got {q}. Set compute: null for this layer, or accum: exact"
            )
        if accum != "exact" and q.rounding == "stochastic":
            raise QexpError(f"compute.accum={accum}: products cannot be rounded stochastically; use another rounding")
        self._accum = accum

    @property
    def format(self) -> dict[str, int | str]:
        """Returns the number format of every operation, in the kernels' terms."""
        q = self.output_quantizer
        q.require_ready()
        return {
            "bits": q.bits,
            "fraction_bits": q.fraction_bits,
            "accumulate": self._accum,
            "rounding": q.rounding,
        }


class PerProductLinear(PerProduct, QuantLinear):
    def compute(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if self._accum == "exact":
            return QuantLinear.compute(self, x, weight, bias)
        return fixed_point_linear(x, weight, bias, **self.format)


class PerProductConv2d(PerProduct, QuantConv2d):
    def compute(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if self._accum == "exact":
            return QuantConv2d.compute(self, x, weight, bias)
        x, padding = padded(self, x)
        return fixed_point_conv2d(
            x,
            weight,
            bias,
            stride=self.stride,
            padding=padding,
            dilation=self.dilation,
            groups=self.groups,
            **self.format,
        )


class PerProductConv1d(PerProduct, QuantConv1d):
    def compute(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if self._accum == "exact":
            return QuantConv1d.compute(self, x, weight, bias)
        x, padding = padded(self, x)
        y = fixed_point_conv2d(
            x[..., None, :],
            weight[..., None, :],
            bias,
            stride=(1, *self.stride),
            padding=(0, *padding),
            dilation=(1, *self.dilation),
            groups=self.groups,
            **self.format,
        )
        return y[..., 0, :]


class _Refuses(PerProduct):
    def configure(self, accum: str = "per_op") -> None:
        if accum != "exact":
            raise QexpError(
                f"{self.float_class.__name__} has no form that rounds each product; set compute: null for this layer with a rule"
            )
        super().configure(accum)


class PerProductConv3d(_Refuses, QuantConv3d): ...


class PerProductConvTranspose2d(_Refuses, QuantConvTranspose2d): ...


def padded(layer: nn.Conv1d | nn.Conv2d, x: Tensor) -> tuple[Tensor, tuple[int, ...]]:
    """Returns the input and the zeros still to add on each side; a padding mode, or `same`, is applied to the input here."""
    if layer.padding_mode == "zeros" and not isinstance(layer.padding, str):
        return x, tuple(layer.padding)
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    return F.pad(x, layer._reversed_padding_repeated_twice, mode=mode), (0,) * len(layer.kernel_size)


FAMILY: dict[type[nn.Module], type[Quantized]] = {
    nn.Conv1d: PerProductConv1d,
    nn.Conv2d: PerProductConv2d,
    nn.Conv3d: PerProductConv3d,
    nn.ConvTranspose2d: PerProductConvTranspose2d,
    nn.Linear: PerProductLinear,
}
