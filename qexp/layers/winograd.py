"""Convolutions that compute on integer codes in the Winograd domain, as an int8 engine does."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from qexp_kernels import winograd_conv2d
from torch import Tensor, nn

from qexp.errors import QexpError
from qexp.layers.per_product import padded
from qexp.layers.quantized import QuantConv2d, Quantized, QuantLinear
from qexp.quantizers.base import Quantizer

OUTPUTS = (2, 4, 5)


class Winograd(Quantized):
    """A layer that computes on the integer codes of its input and weight, then multiplies the sum by both scales.

    3x3 convolutions of one group and stride 1 run in the Winograd domain, F(2,3), F(4,3) or F(5,3), each kernel row along the width
    (1D) or nested (2D): transformed weights and inputs are integers (the denominators cleared), which `clamp_int16` saturates to 16
    bits; overflows are counted. Any odd kernel of stride 2 is rewritten as 3x3 kernels of stride 1 over the four phases of its input
    (7x7: nine). Without the clamp the sums equal those of the direct integer convolution bit for bit. Other convolutions and linear
    layers compute directly on the same codes. Input and weight each need one scale per tensor and the zero point 0. In training the layer
    computes as the ordinary one.

    Source: the Winograd engine of TF2-Engine; Lavin and Gray 2015 (arXiv 1509.09308).
    Differs from the source: the sum is divided by the exact factor that scaled the weights (not its rounded value); batch norm and the
    output's scale are applied together, once.
    """

    _outputs, _two_d, _clamp = 4, False, True

    def configure(self, outputs: int = 4, two_d: bool = False, clamp_int16: bool = True) -> None:
        """Sets the results per tile (2, 4 or 5), the nesting, and whether transformed values saturate to 16 bits."""
        if outputs not in OUTPUTS:
            raise QexpError(
                f"compute.outputs={outputs}; allowed are {', '.join(map(str, OUTPUTS))} for F(2,3), F(4,3), F(5,3)"
            )
        for site in ("input", "weight"):
            q = self.site(site)
            if not isinstance(q, Quantizer) or q.scale.numel() != 1:
                raise QexpError(
                    f"a Winograd layer sums over input channels before it scales back, so its {site} needs a quantizer with one scale "
                    f"(granularity: tensor) on the layer itself, got {q}; set compute: null for this layer"
                )
        self._outputs, self._two_d, self._clamp = outputs, two_d, clamp_int16
        self.register_buffer("_overflows", torch.zeros(2, dtype=torch.int64), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        if self.training or not self.enabled:
            return super().forward(x)
        qx, qw = self.input_quantizer, self.weight_quantizer
        # The quantizers run as in any layer; values that are on the grid already keep their codes.
        x, weight = qx(x), self.quantized_weight()
        for q in (qx, qw):
            if q.gain is not None or bool((q.zero_point != 0).any()):
                raise QexpError(
                    f"{q.name}: a Winograd layer needs symmetric codes (zero point 0) and values without a correction"
                )
        total = self.integer(qx.codes(x).long(), qw.codes(weight).long())
        y = total.double() * (qx.scale.double() * qw.scale.double())
        bias = self.quantized_bias()
        if bias is not None:
            y = y + bias.double().reshape(1, -1, *[1] * (y.ndim - 2))
        return self.output_quantizer(y.to(x.dtype))

    def integer(self, codes: Tensor, weight: Tensor) -> Tensor:
        """Returns the sums of integer codes, int64."""
        raise NotImplementedError

    def account(self) -> dict[str, int]:
        """Returns how many transformed weights and inputs have saturated so far."""
        weights, inputs = self._overflows.tolist()
        return {"winograd_weight_overflows": weights, "winograd_input_overflows": inputs}


class WinogradLinear(Winograd, QuantLinear):
    def integer(self, codes: Tensor, weight: Tensor) -> Tensor:
        return exact(F.linear, codes, weight)


class WinogradConv2d(Winograd, QuantConv2d):
    def integer(self, codes: Tensor, weight: Tensor) -> Tensor:
        kernel, stride = tuple(weight.shape[2:]), tuple(self.stride)
        plain = self.groups == 1 and tuple(self.dilation) == (1, 1) and kernel[0] == kernel[1]
        codes, padding = padded(self, codes)
        codes = F.pad(codes, (padding[1], padding[1], padding[0], padding[0]))
        if plain and kernel == (3, 3) and stride == (1, 1) and min(codes.shape[2:]) >= 3:
            return self._tiles(codes, weight)
        if plain and kernel[0] % 2 and kernel[0] >= 3 and stride == (2, 2):
            return self._tiles(*phases(codes, weight))
        return exact(F.conv2d, codes, weight, None, self.stride, 0, self.dilation, self.groups)

    def _tiles(self, codes: Tensor, weight: Tensor) -> Tensor:
        total, overflows = winograd_conv2d(
            codes, weight, outputs=self._outputs, two_d=self._two_d, clamp_int16=self._clamp
        )
        self._overflows += overflows.to(self._overflows.device)
        return total


def phases(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Returns input and weight of the 3x3 convolution of stride 1 that equals a KxK one of stride 2: [N, C, H, W] -> [N, mC, ...].

    Even and odd rows and columns are convolved separately: with `u = 2a + p`, `y[i] = sum_p sum_a x_p[i + a] k_p[a]`,
    `x_p[i] = x[2i + p]`. An axis of more than three taps is cut into pieces of three. The last piece ends at the last tap; taps that it
    shares with the piece before are zero. The m pieces (7x7: nine, 5x5: four) become input channels; 3 channels become 27.

    Args:
        x: Padded input [N, C, H, W].
        weight: [O, C, K, K], K odd.
    """
    k = weight.shape[2]
    height, width = ((n - k) // 2 + 3 for n in x.shape[2:])  # a 3x3 kernel reads two more than it returns
    inputs, kernels = [], []
    for p, top, rows in _pieces(k):
        for q, left, columns in _pieces(k):
            inputs.append(_window(x[:, :, p::2, q::2], top, left, height, width))
            kernels.append(_window(weight[:, :, p::2, q::2], top, left, 3, 3, rows, columns))
    return torch.cat(inputs, 1), torch.cat(kernels, 1)


def _pieces(k: int) -> Iterator[tuple[int, int, slice]]:
    """Yields parity, window offset and the nonzero taps of the window, for one axis of a K-tap kernel."""
    for parity in (0, 1):
        taps = (k + 1 - parity) // 2
        for first in range(0, taps, 3):
            offset = min(first, max(taps - 3, 0))
            yield parity, offset, slice(first - offset, min(taps - offset, 3))


def _window(
    x: Tensor, top: int, left: int, height: int, width: int, rows: slice | None = None, columns: slice | None = None
) -> Tensor:
    """Returns `x` from (top, left) on, cropped or padded with zeros to a size; for a kernel, only the nonzero taps are copied."""
    part = x[:, :, top : top + height, left : left + width]
    part = F.pad(part, (0, width - part.shape[3], 0, height - part.shape[2]))
    if rows is None or columns is None:
        return part
    kept = torch.zeros_like(part)
    kept[:, :, rows, columns] = part[:, :, rows, columns]
    return kept


def exact(operation, codes: Tensor, weight: Tensor, *args) -> Tensor:
    """Returns a sum of integer products as int64; computes in float64, which is exact for integers up to 2^53."""
    return operation(codes.double(), weight.double(), *args).round().long()


FAMILY: dict[type[nn.Module], type[Quantized]] = {nn.Conv2d: WinogradConv2d, nn.Linear: WinogradLinear}
