"""Other toolkits' simulated quantization of the same network, where they are installed."""

from __future__ import annotations

import copy
import warnings

from torch import Tensor, nn


def fx_qat(model: nn.Module, images: Tensor) -> nn.Module | str:
    """Returns the network as torch.ao prepares it for quantization-aware training (8 bits, its default), or why there is none."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it announces its own retirement
            from torch.ao.quantization import get_default_qat_qconfig_mapping
            from torch.ao.quantization.quantize_fx import prepare_qat_fx

            mapping = get_default_qat_qconfig_mapping("x86")
            return prepare_qat_fx(copy.deepcopy(model).train(), mapping, (images[:1],))
    except (ImportError, AttributeError, NotImplementedError) as error:
        return f"{type(error).__name__}: {error}".splitlines()[0]


PEERS = {"torch.ao fx QAT, 8 bits": fx_qat}
