"""Operations of a `forward` as modules, which stand for function calls (`qexp.layers.forms`).

They lie apart from `qexp.models.modules`, of which the networks of this package are made.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qexp.models import modules


class Add(modules.Add):
    """The sum of two tensors, which the first one holds afterwards, as with `a += b`."""

    into = True

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return a.add_(b)


class Subtract(nn.Module):
    """The difference of two tensors; the first one holds it afterwards with `into`, as with `a -= b`."""

    def __init__(self, into: bool = False) -> None:
        super().__init__()
        self.into = into

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return a.sub_(b) if self.into else a - b


class Multiply(nn.Module):
    """The product of two tensors, element by element; a gate `[N, C, 1, 1]` spreads over the map `[N, C, H, W]`.

    The first tensor holds it afterwards with `into`, as with `a *= b`.
    """

    def __init__(self, into: bool = False) -> None:
        super().__init__()
        self.into = into

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return a.mul_(b) if self.into else a * b


class Divide(nn.Module):
    """The quotient of two tensors, element by element; sizes of 1 of the second are repeated.

    The first tensor holds it afterwards with `into`, as with `a /= b`.
    """

    def __init__(self, into: bool = False) -> None:
        super().__init__()
        self.into = into

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return a.div_(b) if self.into else a / b


class MatMul(nn.Module):
    """The matrix product of two tensors.

    Attributes:
        turned: Whether the last two dimensions of the first and of the second tensor are exchanged before.
    """

    def __init__(self, turned: tuple[bool, bool] = (False, False)) -> None:
        super().__init__()
        self.turned = turned

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        a, b = (x.transpose(-2, -1) if turned else x for x, turned in zip((a, b), self.turned))
        return torch.matmul(a, b)


class Mean(nn.Module):
    """The mean over some dimensions: over 2 and 3, [N, C, H, W] -> [N, C], or [N, C, 1, 1] with `keepdim`."""

    def __init__(self, dims: tuple[int, ...], keepdim: bool = False) -> None:
        super().__init__()
        self.dims = dims
        self.keepdim = keepdim

    def forward(self, input: Tensor) -> Tensor:
        return input.mean(self.dims, self.keepdim)

    def extra_repr(self) -> str:
        return f"dims={self.dims}, keepdim={self.keepdim}"


class Sum(nn.Module):
    """The sum over some dimensions."""

    def __init__(self, dims: tuple[int, ...], keepdim: bool = False) -> None:
        super().__init__()
        self.dims = dims
        self.keepdim = keepdim

    def forward(self, input: Tensor) -> Tensor:
        return input.sum(self.dims, self.keepdim)

    def extra_repr(self) -> str:
        return f"dims={self.dims}, keepdim={self.keepdim}"


class Stack(nn.Module):
    """The operands side by side along a new dimension."""

    def __init__(self, dim: int = 0) -> None:
        super().__init__()
        self.dim = dim

    def forward(self, *xs: Tensor) -> Tensor:
        return torch.stack(xs, self.dim)

    def extra_repr(self) -> str:
        return f"dim={self.dim}"


class Affine(nn.Module):
    """A multiple of a tensor plus a summand, each a number or a constant tensor that spreads over it.

    Attributes:
        factor, summand: The numbers. They are no parameters of the module: they belong to the network around it.
        divisor: The number that the tensor is divided by, where it is divided: `factor` is its reciprocal.
        into: The tensor itself holds the result afterwards, as with `x *= 2`.
    """

    def __init__(
        self,
        factor: float | Tensor = 1.0,
        summand: float | Tensor = 0.0,
        divisor: float | Tensor | None = None,
        into: bool = False,
    ) -> None:
        super().__init__()
        vars(self).update(factor=factor, summand=summand, divisor=divisor)
        self.into = into

    def forward(self, x: Tensor) -> Tensor:
        y = x
        if self.divisor is not None:
            y = y / self.divisor
        elif isinstance(self.factor, Tensor) or self.factor != 1:
            y = y * self.factor
        if isinstance(self.summand, Tensor) or self.summand != 0:
            y = y + self.summand
        return x.copy_(y) if self.into else y


class Elementwise(nn.Module):
    """A function of each element by its name in torch (`abs`, `exp`), with further numbers: `pow`, 2.

    Attributes:
        function: The name, one of `Elementwise.KNOWN`.
        numbers: What the function takes after the tensor.
    """

    KNOWN = ("abs", "square", "pow", "exp", "expm1", "log1p", "sqrt", "rsqrt", "reciprocal", "sin", "cos", "erf")

    def __init__(self, function: str, numbers: tuple[float, ...] = ()) -> None:
        super().__init__()
        self.function, self.numbers = function, numbers

    def forward(self, input: Tensor) -> Tensor:
        return getattr(torch, self.function)(input, *self.numbers)

    def extra_repr(self) -> str:
        return ", ".join(map(str, (self.function, *self.numbers)))


class Length(nn.Module):
    """The root of the sum of squares over some dimensions: `torch.linalg.vector_norm`, `x.norm(p=2, dim=...)`."""

    def __init__(self, dims: tuple[int, ...], keepdim: bool = False) -> None:
        super().__init__()
        self.dims, self.keepdim = dims, keepdim

    def forward(self, input: Tensor) -> Tensor:
        return torch.linalg.vector_norm(input, dim=self.dims, keepdim=self.keepdim)

    def extra_repr(self) -> str:
        return f"dims={self.dims}, keepdim={self.keepdim}"


class UnitLength(nn.Module):
    """Vectors along a dimension, divided by their length: `F.normalize` with p=2.

    Attributes:
        dim: The dimension.
        eps: The least length by which a vector is divided.
    """

    def __init__(self, dim: int = 1, eps: float = 1e-12) -> None:
        super().__init__()
        self.dim, self.eps = dim, eps

    def forward(self, input: Tensor) -> Tensor:
        return F.normalize(input, dim=self.dim, eps=self.eps)

    def extra_repr(self) -> str:
        return f"dim={self.dim}, eps={self.eps}"


class Permute(nn.Module):
    """The dimensions in another order: (0, 2, 3, 1) takes [N, C, H, W] to [N, H, W, C]."""

    def __init__(self, dims: tuple[int, ...]) -> None:
        super().__init__()
        self.dims = dims

    def forward(self, x: Tensor) -> Tensor:
        return x.permute(self.dims)

    def extra_repr(self) -> str:
        return f"dims={self.dims}"


class Transpose(nn.Module):
    """Two dimensions exchanged."""

    def __init__(self, dims: tuple[int, int]) -> None:
        super().__init__()
        self.dims = dims

    def forward(self, x: Tensor) -> Tensor:
        return x.transpose(*self.dims)

    def extra_repr(self) -> str:
        return f"dims={self.dims}"


class Reshape(nn.Module):
    """The same elements in another shape; the first size may be a number that depends on the batch size."""

    def __init__(self, sizes: tuple[int, ...]) -> None:
        super().__init__()
        self.sizes = sizes

    def forward(self, x: Tensor) -> Tensor:
        return x.reshape(self.sizes)

    def extra_repr(self) -> str:
        return f"sizes={self.sizes}"


class Split(nn.Module):
    """A tensor in parts along one dimension: parts of one size (the last may be smaller), of given sizes, or a number of parts."""

    def __init__(self, sizes: int | tuple[int, ...] | None = None, parts: int | None = None, dim: int = 0) -> None:
        super().__init__()
        self.sizes = sizes
        self.parts = parts
        self.dim = dim

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return torch.chunk(x, self.parts, self.dim) if self.sizes is None else torch.split(x, self.sizes, self.dim)

    def extra_repr(self) -> str:
        return f"sizes={self.sizes}, parts={self.parts}, dim={self.dim}"


class Index(nn.Module):
    """A part of a tensor: `x[index]`."""

    def __init__(self, index: object) -> None:
        super().__init__()
        self.index = index

    def forward(self, x: Tensor) -> Tensor:
        return x[self.index]

    def extra_repr(self) -> str:
        return f"index={self.index}"


class Squeeze(nn.Module):
    """A tensor without those of some dimensions that have one entry."""

    def __init__(self, dims: tuple[int, ...]) -> None:
        super().__init__()
        self.dims = dims

    def forward(self, x: Tensor) -> Tensor:
        return x.squeeze(self.dims)

    def extra_repr(self) -> str:
        return f"dims={self.dims}"


class Roll(nn.Module):
    """A tensor whose entries move along some dimensions; those that leave at one end come in at the other."""

    def __init__(self, shifts: tuple[int, ...], dims: tuple[int, ...]) -> None:
        super().__init__()
        self.shifts = shifts
        self.dims = dims

    def forward(self, x: Tensor) -> Tensor:
        return torch.roll(x, self.shifts, self.dims)

    def extra_repr(self) -> str:
        return f"shifts={self.shifts}, dims={self.dims}"


class Pad(nn.Module):
    """A tensor with a border: (left, right, top, bottom, front, back) as torch counts them."""

    def __init__(self, sizes: tuple[int, ...], mode: str = "constant", value: float | None = None) -> None:
        super().__init__()
        self.sizes = sizes
        self.mode = mode
        self.value = value

    def forward(self, x: Tensor) -> Tensor:
        return F.pad(x, self.sizes, self.mode, self.value)

    def extra_repr(self) -> str:
        return f"sizes={self.sizes}, mode={self.mode!r}, value={self.value}"
