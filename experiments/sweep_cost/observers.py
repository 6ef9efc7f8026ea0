"""The same post-training quantization with torch.ao's observers and fake-quantize modules, for scale."""

from __future__ import annotations

import copy
import time
from collections.abc import Sequence

import torch
from pytorch_lightning import LightningDataModule
from torch import Tensor, nn
from torch.ao.quantization import FakeQuantize, HistogramObserver, PerChannelMinMaxObserver

from qexp.network.facts import facts
from qexp.passes.fold_bn import fold_bn


def attach(model: nn.Module, wbit: int, abit: int, ends: int = 8) -> list[FakeQuantize]:
    """Puts a fake-quantize on the input and on the weight of every convolution and linear layer, in place; returns those of inputs."""
    layers = [m for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    inputs = []
    for i, layer in enumerate(layers):
        w, a = (ends, ends) if i in (0, len(layers) - 1) else (wbit, abit)
        affine = {"quant_min": 0, "quant_max": 2**a - 1, "dtype": torch.quint8}
        seen = FakeQuantize(HistogramObserver, **affine, qscheme=torch.per_tensor_affine)
        seen.disable_fake_quant()
        layer.register_forward_pre_hook(lambda _, args, q=seen: (q(args[0]), *args[1:]))
        inputs.append(seen)
        grid = {"quant_min": -(2 ** (w - 1)) + 1, "quant_max": 2 ** (w - 1) - 1, "dtype": torch.qint8}
        weight = FakeQuantize(PerChannelMinMaxObserver, **grid, qscheme=torch.per_channel_symmetric, ch_axis=0)
        with torch.no_grad():
            layer.weight.copy_(weight(layer.weight))
    return inputs


@torch.no_grad()
def point(
    model: nn.Module, data: LightningDataModule, images: Sequence[Tensor], wbit: int, abit: int
) -> tuple[float, float, float]:
    """Returns the seconds of calibration and of evaluation, and the accuracy, of a copy of the float model at these widths."""
    model = copy.deepcopy(model).eval()
    start = time.perf_counter()
    fold_bn(model, facts(model, data.example()))
    inputs = attach(model, wbit, abit)
    for batch in images:
        model(batch)
    for q in inputs:
        q.disable_observer()
        q.enable_fake_quant()
        q.calculate_qparams()
    calibrated = time.perf_counter()
    right = total = 0
    for batch, labels in data.test_dataloader():
        right += int((model(batch).argmax(1) == labels).sum())
        total += len(labels)
    return calibrated - start, time.perf_counter() - calibrated, right / total
