"""Networks quantized and calibrated, ready to be lowered."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from torch import Tensor, nn

from qexp.calibration.calibrate import calibrate
from qexp.integer.lowered import Lowered
from qexp.integer.lowering import lower
from qexp.network.facts import facts
from qexp.passes.base import PassContext
from qexp.passes.clear_sums import ClearSums
from qexp.passes.fold_bn import fold_bn
from qexp.recipe import Recipe, apply, resolve

UNIFORM = {"_target_": "qexp.quantizers.uniform.Uniform", "symmetric": False, "granularity": "tensor"}
CHANNELS = {"_target_": "qexp.quantizers.uniform.Uniform", "signed": True, "narrow": True, "granularity": "channel"}
FIXED = {"_target_": "qexp.quantizers.fixed_point.FixedPoint", "granularity": "tensor"}
Quantize = Callable[..., tuple[nn.Module, Tensor]]
INT8 = OmegaConf.to_container(OmegaConf.load(Path(__file__).parents[2] / "conf/deploy/int8.yaml").quant.rules)


@pytest.fixture
def quantize() -> Quantize:
    """Call with a network; returns it quantized and calibrated on random images, which come along."""

    def quantized(
        model: nn.Module,
        wbit: int = 8,
        abit: int = 8,
        *,
        fold: bool = True,
        rules: dict[str, Any] | None = None,
        shape: tuple[int, ...] = (24, 3, 8, 8),
        **sites: Any,
    ) -> tuple[nn.Module, Tensor]:
        torch.manual_seed(1)
        images = torch.randn(shape)
        model = model.eval()
        structure = facts(model, images[:1])
        if fold:
            fold_bn(model, structure)
            structure = facts(model, images[:1])
        chosen = {"input": UNIFORM, "weight": CHANNELS} | sites
        plan = resolve(model, structure, Recipe(sites=chosen, wbit=wbit, abit=abit, rules=rules or {}))
        apply(model, plan, structure)
        calibrate(model, [images], progress=False)
        return model, images

    return quantized


@pytest.fixture
def deployed(quantize: Quantize) -> Callable[..., tuple[Lowered, nn.Module, Tensor]]:
    """Call with a network; returns its program as `deploy=int8` makes it, the quantized network, and images."""

    def made(model: nn.Module, *args: Any, **options: Any) -> tuple[Lowered, nn.Module, Tensor]:
        rules = {**(options.pop("rules", None) or {}), **INT8}
        model, images = quantize(model, *args, rules=rules, **options)
        ClearSums().on_fitted(model, PassContext(facts(model, images[:1]), [images], {}))
        return lower(model, images[:1], as_runtimes=True), model, images

    return made
