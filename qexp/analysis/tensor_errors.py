"""Quantization error of each tensor on one batch: error measures and use of the levels."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from qexp.layers.quantized import quantizers, weight_of
from qexp.layers.swap import evaluating
from qexp.quantizers.base import Quantizer
from qexp.system.within import hooked

Measures = dict[tuple[str, str], dict[str, float]]  # by (layer, site)
_SORTED_ABOVE = 2**20  # codes with a wider span are sorted instead of counted in bins


@torch.no_grad()
def measure(model: nn.Module, images: Tensor) -> Measures:
    """Returns, by (layer, site) of each quantizer: sqnr (dB), mse, cosine, norm1 (%), saturation (%), entropy (bits), levels_used.

    Activations are those of the quantized network on `images` `[N, C, H, W]`, so each error is the tensor's own, without earlier ones.
    """
    out: Measures = {}
    by_module: dict[int, list[tuple[str, str]]] = {}
    activations = []
    for name, site, quantizer in quantizers(model):
        weight = weight_of(model.get_submodule(name), site)
        if weight is not None:
            out[name, site] = tensor_errors(quantizer, weight)
            continue
        if id(quantizer) not in by_module:
            activations.append(quantizer)
        by_module.setdefault(id(quantizer), []).append((name, site))
    with evaluating(model), hooked(q.register_forward_hook(_hook(by_module, out)) for q in activations):
        model(images)
    return out


def _hook(by_module: dict[int, list[tuple[str, str]]], out: dict):
    def see(quantizer: Quantizer, args: tuple[Tensor, ...], y: Tensor) -> None:
        for key in by_module[id(quantizer)]:
            out[key] = tensor_errors(quantizer, args[0], y)

    return see


def tensor_errors(quantizer: Quantizer, x: Tensor, y: Tensor | None = None) -> dict[str, float]:
    """Returns the error measures of one tensor.

    norm1 is `100 sum|q - x/s| / sum|x/s|`, in steps: each channel or group of values is divided by its own scale (for unevenly spaced
    levels, by the mean spacing; a single scale cancels). Saturation counts values on the outermost levels whose distance from the level
    is more than half a step.
    """
    x = x.detach().float()
    y = (quantizer(x) if y is None else y).detach().float()
    codes = quantizer.codes(x).flatten()
    apart = (x - y).abs()
    error, power = apart.square().sum(), x.square().sum()
    low, high = torch.aminmax(codes)
    counts = _counts(codes, low, high)
    share = counts.double() / counts.sum()
    rows, _ = quantizer.rows(apart)
    far = codes[(rows > 0.501 * torch.as_tensor(quantizer.scale).to(x.device)).flatten()]  # few, if the range fits
    return {
        "sqnr": float(10 * torch.log10(power / error)) if error > 0 and power > 0 else float("inf"),
        "mse": float(error / x.numel()),
        "cosine": float((x * y).sum() / (power.sqrt() * y.square().sum().sqrt()).clamp_min(1e-30)),
        "norm1": 100 * _steps(quantizer, apart) / max(_steps(quantizer, x.abs()), 1e-30),
        "saturation": 100 * int(((far == low) | (far == high)).sum()) / codes.numel(),
        "entropy": float(-(share * share.log2()).sum()),
        "levels_used": len(counts),
    }


def _steps(quantizer: Quantizer, magnitudes: Tensor) -> float:
    """Returns the sum of magnitudes, each in steps of its own scale; with a single scale, in the tensor's own unit."""
    scale = torch.as_tensor(quantizer.scale).detach()
    rows, axis = quantizer.rows(magnitudes)
    if scale.numel() == 1 or axis is None:
        return float(magnitudes.sum())
    sums = rows.sum([d for d in range(rows.ndim) if d != axis % rows.ndim])
    return float((sums.double() / scale.flatten().to(sums.device).double()).sum())  # a tiny scale overflows float32


def _counts(codes: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """Returns the count of each code that occurs, in ascending order of the codes, which lie in `low..high`."""
    span = float(high) - float(low)  # in a diverged network: NaN, or too large for its integer type
    if not 0 <= span < _SORTED_ABOVE:
        return torch.unique(codes, return_counts=True)[1]
    counts = torch.bincount((codes - low).int())
    return counts[counts > 0]
