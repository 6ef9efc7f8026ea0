"""Integer Winograd convolution in plain PyTorch."""

import torch
import torch.nn.functional as F
from torch import Tensor

from .matrices import MATRICES


def _apply(matrix, x: Tensor, dim: int) -> Tensor:
    """Returns `matrix` times `x` along `dim`, in int64 (integer matmul does not exist on every device)."""
    rows = x.unbind(dim)
    return torch.stack([sum(c * r for c, r in zip(row, rows, strict=True)) for row in matrix], dim)


def _saturate(x: Tensor, clamp: bool) -> tuple[Tensor, Tensor]:
    if not clamp:
        return x, x.new_zeros(())
    clipped = x.clamp(-32768, 32767)
    return clipped, (clipped != x).sum()


def forward(x: Tensor, weight: Tensor, outputs: int, two_d: bool, padding: int, clamp: bool) -> tuple[Tensor, Tensor]:
    """Returns the accumulators (int64) and the number of transformed weights and inputs that saturated ([2])."""
    m = MATRICES[outputs]
    reach = outputs + 2
    height, width = x.shape[2] + 2 * padding - 2, x.shape[3] + 2 * padding - 2
    tiles = -(-width // outputs)
    bands = -(-height // outputs) if two_d else height
    bottom = bands * outputs + 2 if two_d else height + 2
    d = F.pad(
        x.to(torch.int64),
        (padding, tiles * outputs + 2 - x.shape[3] - padding, padding, bottom - x.shape[2] - padding),
    )
    d = d.unfold(3, reach, outputs)
    g = _apply(m.g, weight.to(torch.int64), 3)
    if two_d:
        d, g = d.unfold(2, reach, outputs), _apply(m.g, g, 2)
        d = _apply(m.bt, d, 5)
    v, saturated_v = _saturate(_apply(m.bt, d, 4), clamp)  # [N, C, rows, tiles, i(, j)]
    u, saturated_u = _saturate(g, clamp)  # [Cout, C, 3 or i, j]
    total = 0
    for c in range(x.shape[1]):
        if two_d:  # the last two axes of v are (columns, rows) of the tile
            total = total + v[:, None, c].transpose(-1, -2) * u[None, :, c, None, None]
        else:
            for row in range(3):
                total = total + v[:, None, c, row : row + height] * u[None, :, c, None, None, row]
    y = _apply(m.at, total, 5 if two_d else 4)
    if two_d:
        y = _apply(m.at, y, 4).permute(0, 1, 2, 4, 3, 5)
    divisor = m.divisor**2 if two_d else m.divisor
    y = torch.div(y, divisor, rounding_mode="trunc")
    rows = bands * outputs if two_d else height
    y = y.reshape(x.shape[0], weight.shape[0], rows, tiles * outputs)[:, :, :height, :width]
    return y.contiguous(), torch.stack([saturated_u, saturated_v])
