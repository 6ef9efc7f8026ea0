"""Layers that carry quantizers: each is a float layer with a quantizer (or `nn.Identity`) on every site.

The pattern is input -> compute(input, weight, bias) -> output. A layer type is a two-line class here. A method that changes the
arithmetic subclasses one of them and overrides `compute`. It overrides `forward` instead where it needs codes or the raw input; that
`forward` must compute as the float layer does while `enabled` is False.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qexp.errors import QexpError
from qexp.layers.running import RUNNING, left
from qexp.models import operations
from qexp.models.activations import Maxout, RPReLU
from qexp.models.modules import Add, Concat
from qexp.models.operations import Divide, Elementwise, Length, MatMul, Mean, Multiply, Subtract, Sum, UnitLength
from qexp.quantizers.base import Quantizer

GRADIENT = "grad_output"  # the gradient with respect to a layer's result, before the layer uses it


ROUTED = "routed"  # attribute of a class whose instances pass function calls to stand-ins: their class before (`qexp.layers.calls`)
COMPUTES_AS = "_computes_as"  # attribute of a layer of a subclass that computes what this base class computes
AT_SIZE = "_at_size"  # height and width of the maps for which that is so, where the layer's borders depend on them
BAKED = "baked_weight"  # a buffer, so that it follows the layer to its device; held while evaluating, never saved


def attribute(site: str) -> str:
    """Returns the name of the submodule that holds a site's quantizer: `input.0` -> `input_0_quantizer`."""
    return site.replace(".", "_") + "_quantizer"


class Quantized(nn.Module):
    """A layer whose tensors pass through quantizers; only `swap` makes one, from a float layer.

    Attributes:
        sites: Names of the tensors that can carry a quantizer.
        operands: Names of the tensor arguments of the float layer's `forward`.
        options: Names of the other arguments of its `forward`.
        float_class: The class the layer had before; `unswap` and `bake` restore it.
        learns: Names of parameters that the layer's computation adds to those of the float layer; they train as scales do.
    """

    sites: tuple[str, ...] = ("input", "weight", "bias", "output", GRADIENT)
    operands: tuple[str, ...] = ("input",)
    options: tuple[str, ...] = ()
    float_class: type[nn.Module]
    enabled: bool = True  # False: compute as the float layer (see `quantizers_off`)
    learns: tuple[str, ...] = ()

    def configure(self, **options: Any) -> None:
        """Sets the options of the layer's computation; called once, after the swap. The ordinary computation has none."""
        if options:
            raise QexpError(f"{type(self).__name__} takes no options, got {', '.join(options)}")

    def shaped(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Receives the shapes of the layer's tensors by site; called once, after `configure`. The ordinary computation ignores them."""

    def site(self, name: str) -> nn.Module:
        """Returns the quantizer on a site; `nn.Identity` where the tensor stays float."""
        return getattr(self, attribute(name))

    def quantized_weight(self) -> Tensor:
        """Returns the quantized weight that the layer computes with."""
        baked = self._buffers.get(BAKED)
        return self.weight_quantizer(self.weight) if baked is None else baked

    def quantized_bias(self) -> Tensor | None:
        """Returns the bias that the layer computes with; None where there is none."""
        return None if self.bias is None else self.bias_quantizer(self.bias)

    def compute(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Returns the layer's result for a quantized input, weight and bias; subclasses override this.

        Further arguments of the float layer's `forward` (the `output_size` of a transposed convolution) follow, where a call passes them.
        """
        raise NotImplementedError

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Calls the layer with its operands by position and all other arguments by name, so that hooks find the tensors in `args`."""
        for name in self.operands[len(args) :] if kwargs else ():
            if name in kwargs:
                args = (*args, kwargs.pop(name))
        if self.options and len(args) > len(self.operands):
            kwargs |= zip(self.options, args[len(self.operands) :])
            args = args[: len(self.operands)]
        if not RUNNING.modes:
            return super().__call__(*args, **kwargs)
        with left():
            return super().__call__(*args, **kwargs)

    def forward(self, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if not self.enabled:
            return self.float_class.forward(self, input, *args, **kwargs)
        weight, bias = self.quantized_weight(), self.quantized_bias()
        return self.finish(self.compute(self.input_quantizer(input), weight, bias, *args, **kwargs))

    def finish(self, y: Tensor) -> Tensor:
        """Returns the layer's result: quantizes the computed values now, and their gradient in the backward pass."""
        if y.requires_grad and isinstance(self.grad_output_quantizer, Quantizer):
            y.register_hook(self.grad_output_quantizer)
        return self.output_quantizer(y)

    def before_training(self, total_steps: int) -> None:
        """Calls `before_training` of each quantizer with the float tensor it quantizes (None for activations)."""
        for site in self.sites:
            quantizer = self.site(site)
            if isinstance(quantizer, Quantizer):
                quantizer.on_training_start(self._latent(site), total_steps)

    def after_optimizer_step(self) -> None:
        """Calls `after_optimizer_step` of each quantizer with the float tensor it quantizes (None for activations)."""
        for site in self.sites:
            quantizer = self.site(site)
            if isinstance(quantizer, Quantizer):
                quantizer.on_optimizer_step(self._latent(site))

    def _latent(self, site: str) -> Tensor | None:
        return getattr(self, site) if site in ("weight", "bias") else None


class QuantConv1d(Quantized, nn.Conv1d):
    def compute(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return self._conv_forward(x, weight, bias)


class QuantConv2d(Quantized, nn.Conv2d):
    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        known = vars(self).get(AT_SIZE)
        if known is not None and tuple(input.shape[-2:]) != known:
            raise QexpError(
                f"a convolution that pads by the size of its input got a map of {list(input.shape[-2:])} and was read with {list(known)}; "
                "use images of one size"
            )
        return nn.Conv2d._conv_forward(self, input, weight, bias)

    def compute(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return self._conv_forward(x, weight, bias)


class QuantConv3d(Quantized, nn.Conv3d):
    def compute(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return self._conv_forward(x, weight, bias)


class QuantConvTranspose2d(Quantized, nn.ConvTranspose2d):
    options = ("output_size",)

    def compute(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, output_size: Sequence[int] | None = None
    ) -> Tensor:
        padding = self._output_padding(
            x, output_size, self.stride, self.padding, self.kernel_size, x.ndim - 2, self.dilation
        )
        return F.conv_transpose2d(x, weight, bias, self.stride, self.padding, padding, self.groups, self.dilation)


class QuantLinear(Quantized, nn.Linear):
    def compute(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.linear(x, weight, bias)


class _QuantBatchNorm(Quantized):
    """Batch norm whose affine parameters and running statistics can be quantized; training uses the statistics of the batch."""

    sites = ("input", "weight", "bias", "running_mean", "running_var", "output")

    def forward(self, input: Tensor) -> Tensor:
        if not self.enabled:
            return self.float_class.forward(self, input)
        x = self.input_quantizer(input)
        if self.running_mean is None or (self.training and not self.track_running_stats):
            y = F.batch_norm(x, None, None, self.quantized_weight(), self.quantized_bias(), True, 0.0, self.eps)
        elif self.training:
            y = F.batch_norm(
                x,
                self.running_mean,
                self.running_var,
                self.quantized_weight(),
                self.quantized_bias(),
                True,
                *self._step(),
            )
        else:
            mean, var = self.running_mean_quantizer(self.running_mean), self.running_var_quantizer(self.running_var)
            y = F.batch_norm(x, mean, var, self.quantized_weight(), self.quantized_bias(), False, 0.0, self.eps)
        return self.output_quantizer(y)

    def _step(self) -> tuple[float, float]:
        """Returns momentum and eps of a training step; counts the step as nn.BatchNorm2d does."""
        self.num_batches_tracked.add_(1)
        momentum = self.momentum if self.momentum is not None else 1.0 / float(self.num_batches_tracked)
        return momentum, self.eps


class QuantBatchNorm1d(_QuantBatchNorm, nn.BatchNorm1d): ...


class QuantBatchNorm2d(_QuantBatchNorm, nn.BatchNorm2d): ...


class Unweighted(Quantized):
    """A layer without weights: only its input and its output can be quantized; of a tuple, only the first tensor."""

    sites = ("input", "output")

    def forward(self, input: Tensor, *args: Any, **kwargs: Any) -> Any:
        if not self.enabled:
            return self.float_class.forward(self, input, *args, **kwargs)
        if self.writes_back:
            given = input.clone() if torch.is_grad_enabled() else input  # a quantizer may keep it for its gradient
            return input.copy_(self._quantized(given, *args, **kwargs))
        return self._quantized(input, *args, **kwargs)

    def _quantized(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Returns the layer's result between its quantizers; of a tuple, the first part is the result."""
        result = self.float_class.forward(self, self.input_quantizer(x), *args, **kwargs)
        if isinstance(result, tuple):
            return (self.output_quantizer(result[0]), *result[1:])
        return self.output_quantizer(result)

    @property
    def writes_back(self) -> bool:
        """Returns whether the layer works in place and has quantizers, so that later readers of its input need the quantized values."""
        return bool(getattr(self, "inplace", False)) and any(type(self.site(s)) is not nn.Identity for s in self.sites)


class QuantAvgPool2d(Unweighted, nn.AvgPool2d): ...


class QuantAdaptiveAvgPool2d(Unweighted, nn.AdaptiveAvgPool2d): ...


class QuantMaxPool2d(Unweighted, nn.MaxPool2d): ...


class QuantReLU(Unweighted, nn.ReLU): ...


class QuantReLU6(Unweighted, nn.ReLU6): ...


class QuantPReLU(Unweighted, nn.PReLU): ...


class QuantRPReLU(Unweighted, RPReLU): ...


class QuantMaxout(Unweighted, Maxout): ...


class QuantCELU(Unweighted, nn.CELU): ...


class QuantSELU(Unweighted, nn.SELU): ...


class QuantSoftsign(Unweighted, nn.Softsign): ...


class QuantLogSigmoid(Unweighted, nn.LogSigmoid): ...


class QuantTanhshrink(Unweighted, nn.Tanhshrink): ...


class QuantSoftshrink(Unweighted, nn.Softshrink): ...


class QuantHardshrink(Unweighted, nn.Hardshrink): ...


class QuantThreshold(Unweighted, nn.Threshold): ...


class QuantHardtanh(Unweighted, nn.Hardtanh): ...


class QuantElementwise(Unweighted, Elementwise): ...


class QuantLeakyReLU(Unweighted, nn.LeakyReLU): ...


class QuantSiLU(Unweighted, nn.SiLU): ...


class QuantHardswish(Unweighted, nn.Hardswish): ...


class QuantHardsigmoid(Unweighted, nn.Hardsigmoid): ...


class QuantSigmoid(Unweighted, nn.Sigmoid): ...


class QuantTanh(Unweighted, nn.Tanh): ...


class QuantGELU(Unweighted, nn.GELU): ...


class QuantELU(Unweighted, nn.ELU): ...


class QuantMish(Unweighted, nn.Mish): ...


class QuantSoftplus(Unweighted, nn.Softplus): ...


class QuantSoftmax(Unweighted, nn.Softmax): ...


class QuantLayerNorm(Unweighted, nn.LayerNorm): ...


class QuantGroupNorm(Unweighted, nn.GroupNorm): ...


class QuantInstanceNorm2d(Unweighted, nn.InstanceNorm2d): ...


class QuantLength(Unweighted, Length): ...


class QuantUnitLength(Unweighted, UnitLength): ...


class QuantUpsample(Unweighted, nn.Upsample): ...


class QuantMean(Unweighted, Mean): ...


class QuantSum(Unweighted, Sum): ...


class OfTwo(Quantized):
    """An operation on two tensors, with a quantizer on each operand and on the result."""

    sites = ("input.0", "input.1", "output")
    operands = ("a", "b")

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        if not self.enabled:
            return self.float_class.forward(self, a, b)
        if not getattr(self, "into", False):
            return self._quantized(a, b)
        given = a.clone() if torch.is_grad_enabled() else a  # a quantizer may keep it for its gradient
        return a.copy_(self._quantized(given, b))

    def _quantized(self, a: Tensor, b: Tensor) -> Tensor:
        result = self.float_class.forward(self, self.input_0_quantizer(a), self.input_1_quantizer(b))
        return self.output_quantizer(result)


class QuantAdd(OfTwo, Add):
    """A residual add with a quantizer on each operand and on the sum."""


class QuantAddInto(OfTwo, operations.Add):
    """The same for `a += b`: the first operand holds the quantized sum afterwards."""


class QuantSubtract(OfTwo, Subtract):
    """A difference with a quantizer on each operand and on the result."""


class QuantMultiply(OfTwo, Multiply):
    """A product of two tensors (a gate) with a quantizer on each operand and on the result."""


class QuantDivide(OfTwo, Divide):
    """A quotient of two tensors with a quantizer on each operand and on the result."""


class QuantMatMul(OfTwo, MatMul):
    """A product of two matrices of activations with a quantizer on each operand and on the result."""

    into = False


class QuantConcat(Quantized, Concat):
    """A concatenation with a quantizer on the result (its operands then share one scale)."""

    sites = ("output",)

    def forward(self, *xs: Tensor) -> Tensor:
        y = Concat.forward(self, *xs)
        return self.output_quantizer(y) if self.enabled else y


QUANTIZED: dict[type[nn.Module], type[Quantized]] = {
    nn.Conv1d: QuantConv1d,
    nn.Conv2d: QuantConv2d,
    nn.Conv3d: QuantConv3d,
    nn.ConvTranspose2d: QuantConvTranspose2d,
    nn.Linear: QuantLinear,
    nn.BatchNorm1d: QuantBatchNorm1d,
    nn.BatchNorm2d: QuantBatchNorm2d,
    nn.AvgPool2d: QuantAvgPool2d,
    nn.AdaptiveAvgPool2d: QuantAdaptiveAvgPool2d,
    nn.MaxPool2d: QuantMaxPool2d,
    nn.ReLU: QuantReLU,
    nn.ReLU6: QuantReLU6,
    nn.PReLU: QuantPReLU,
    RPReLU: QuantRPReLU,
    Maxout: QuantMaxout,
    nn.SiLU: QuantSiLU,
    nn.Hardswish: QuantHardswish,
    nn.LeakyReLU: QuantLeakyReLU,
    nn.Hardsigmoid: QuantHardsigmoid,
    nn.Sigmoid: QuantSigmoid,
    nn.Tanh: QuantTanh,
    nn.GELU: QuantGELU,
    nn.ELU: QuantELU,
    nn.Mish: QuantMish,
    nn.Softplus: QuantSoftplus,
    nn.CELU: QuantCELU,
    nn.SELU: QuantSELU,
    nn.Softsign: QuantSoftsign,
    nn.LogSigmoid: QuantLogSigmoid,
    nn.Tanhshrink: QuantTanhshrink,
    nn.Softshrink: QuantSoftshrink,
    nn.Hardshrink: QuantHardshrink,
    nn.Threshold: QuantThreshold,
    nn.Hardtanh: QuantHardtanh,
    Elementwise: QuantElementwise,
    nn.Softmax: QuantSoftmax,
    nn.LayerNorm: QuantLayerNorm,
    nn.GroupNorm: QuantGroupNorm,
    nn.InstanceNorm2d: QuantInstanceNorm2d,
    Length: QuantLength,
    UnitLength: QuantUnitLength,
    nn.Upsample: QuantUpsample,
    Mean: QuantMean,
    Sum: QuantSum,
    Add: QuantAdd,
    operations.Add: QuantAddInto,
    Subtract: QuantSubtract,
    Multiply: QuantMultiply,
    Divide: QuantDivide,
    MatMul: QuantMatMul,
    Concat: QuantConcat,
}
for _float, _quantized in QUANTIZED.items():
    _quantized.float_class = _float

WEIGHTED = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose2d, nn.Linear)


_SHORTHAND = frozenset(  # attributes that a subclass may define and still compute as its base does
    (
        "__init__",
        "__repr__",
        "extra_repr",
        "reset_parameters",
        "__constants__",
        "__module__",
        "__qualname__",
        "__doc__",
        "__annotations__",
    )
    + (
        "__firstlineno__",
        "__static_attributes__",
        "__parameters__",
        "__orig_bases__",
        "__annotate__",
        "__annotate_func__",
    )
)


def float_class(layer: nn.Module) -> type[nn.Module]:
    """Returns the class of a layer before any swap; for a subclass that computes the same as its base class, the base class."""
    if isinstance(layer, Quantized):
        return layer.float_class
    return vars(layer).get(COMPUTES_AS) or _base(type(layer))


@cache
def _base(kind: type[nn.Module]) -> type[nn.Module]:
    """Returns the base of a subclass that only adds an `__init__` (`class Conv3(nn.Conv2d)`), else the class itself."""
    kind = vars(kind).get(ROUTED, kind)
    for cls in kind.__mro__:
        if cls in QUANTIZED:
            return cls
        if not _SHORTHAND.issuperset(vars(cls)):
            break
    return kind


def channel_axis(layer: nn.Module, site: str, ndim: int = 4) -> int:
    """Returns the channel axis of a site's tensor: 1 for weights of a transposed convolution, 0 for other weights, 1 for activations.

    The channels of a linear layer are its features; they lie in the last of the `ndim` dimensions of its input and result.
    """
    if site == "weight":
        return 1 if issubclass(float_class(layer), nn.ConvTranspose2d) else 0
    return 0 if site in ("bias", "running_mean", "running_var") else activation_axis(layer, ndim)


def transposed_blocks(layer: nn.Module) -> int:
    """Returns the number of scales of a grouped transposed convolution's weight, one per block of elements; 0 for other layers.

    One per output channel where each group has one input channel (depthwise), else one per group.
    """
    if not issubclass(float_class(layer), nn.ConvTranspose2d) or layer.groups == 1:
        return 0
    return layer.out_channels if layer.in_channels == layer.groups else layer.groups


def activation_axis(layer: nn.Module, ndim: int) -> int:
    """Returns the channel axis of a layer's input or result with `ndim` dimensions."""
    return ndim - 1 if issubclass(float_class(layer), nn.Linear) else 1


def operands(args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
    """Returns the tensors among a layer's arguments, passed by position or by name."""
    return [x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)]


def main(result: Any) -> Any:
    """Returns the tensor of the `output` site from a layer's result: the first of a tuple (a max pool's indices come second)."""
    return result[0] if isinstance(result, tuple) and result else result


def quantized_layers(model: nn.Module) -> Iterator[tuple[str, Quantized]]:
    """Yields the name and the module of every layer that carries quantizers, each once."""
    for name, module in model.named_modules():
        if isinstance(module, Quantized):
            yield name, module


def quantizers(model: nn.Module) -> Iterator[tuple[str, str, Quantizer]]:
    """Yields layer name, site and quantizer of every quantized tensor of the forward pass; gradients are not included."""
    for name, layer in quantized_layers(model):
        for site in layer.sites:
            quantizer = layer.site(site)
            if isinstance(quantizer, Quantizer) and site != GRADIENT:
                yield name, site, quantizer


def is_quantizer_parameter(model: nn.Module) -> set[int]:
    """Returns the ids of all parameters that belong to quantizers (scales, clips), for parameter groups of their own."""
    own = {id(getattr(layer, name)) for _, layer in quantized_layers(model) for name in layer.learns}
    return own | {id(p) for _, _, q in quantizers(model) for p in q.parameters()}


def latent_decays(model: nn.Module) -> dict[int, float]:
    """Returns the weight decays that quantizers set for their float weights, by id of the weight."""
    return {
        id(model.get_submodule(name).weight): q.latent_decay
        for name, site, q in quantizers(model)
        if site == "weight" and q.latent_decay is not None
    }


def weight_of(layer: nn.Module, site: str) -> Tensor | None:
    """Returns the site's tensor if the layer holds it (a weight or bias, say); None for an activation."""
    if site in ("weight", "bias", "running_mean", "running_var"):
        tensor = getattr(layer, site, None)
        return tensor.detach() if isinstance(tensor, torch.Tensor) else None
    return None
