"""The simulated network as an archive of `torch.export`: ordinary PyTorch operations, which a program without qexp loads and runs.

model.pt2                 the graph; weights as the network computes with them, quantizers of activations as arithmetic; any batch size
golden.safetensors        a few images and the scores the network gave them

import torch
from safetensors.torch import load_file
golden = load_file("golden.safetensors")
scores = torch.export.load("model.pt2").module()(golden["images"])
"""

from __future__ import annotations

import copy
import logging
import shutil
import warnings
from pathlib import Path
from typing import Any

import torch
from qexp_kernels.library import REFERENCES
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from qexp.errors import QexpError
from qexp.layers.quantized import BAKED, QUANTIZED, quantized_layers
from qexp.layers.swap import baked_weights, evaluating

ARCHIVE, GOLDEN = "model.pt2", "golden.safetensors"


@torch.no_grad()
def write(model: nn.Module, folder: Path, images: Tensor) -> dict[str, Any]:
    """Writes the archive of a quantized network and its golden vectors; returns what they hold: `bytes`, `operations`.

    Args:
        model: Calibrated, on the CPU; left as it was.
        folder: Made, or emptied of an earlier archive.
        images: A few real images `[N, C, H, W]`, at least two.

    Raises:
        QexpError: The network cannot be traced; the message gives the reason.
    """
    with evaluating(model), baked_weights(model):
        scores = model(images)
        program = _traced(_lean(model), images)
    ours = sorted({str(n.target) for n in program.graph.nodes if str(n.target).startswith("qexp.")})
    if ours:
        raise QexpError(f"export=torch: the operations {', '.join(ours)} have no form in plain PyTorch")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    torch.export.save(program, folder / ARCHIVE)
    save_file({"images": images.contiguous(), "scores": scores.contiguous()}, folder / GOLDEN)
    calls = sum(n.op == "call_function" for n in program.graph.nodes)
    return {"bytes": (folder / ARCHIVE).stat().st_size, "operations": calls}


def _lean(model: nn.Module) -> nn.Module:
    """Returns a copy whose ordinary layers hold their quantized weights and biases alone, not the float ones beside them."""
    model = copy.deepcopy(model)
    for _, layer in quantized_layers(model):
        if type(layer) in QUANTIZED.values() and BAKED in layer._buffers:
            layer.weight.data = layer._buffers.pop(BAKED)
            if layer.bias is not None:  # before the weight's scale is removed, which may be the unit of a bias
                layer.bias.data = layer.quantized_bias()
                layer.bias_quantizer = nn.Identity()
            layer.weight_quantizer = nn.Identity()
    return model


def _traced(model: nn.Module, images: Tensor) -> torch.export.ExportedProgram:
    """Returns the traced network with quantizers decomposed into their operations and without source locations."""
    any_batch = ({0: torch.export.Dim("N")},)
    table = {getattr(torch.ops.qexp, name).default: reference for name, reference in REFERENCES.items()}
    noisy = logging.getLogger("torch.export")
    before = noisy.level
    noisy.setLevel(logging.ERROR)
    try:
        program = torch.export.export(model, (images,), dynamic_shapes=any_batch, strict=False).run_decompositions(
            table
        )
    except Exception as error:  # a foreign model's forward may raise anything while it is traced
        reason = str(error).strip().splitlines()[0] if str(error).strip() else ""
        raise QexpError(
            f"export=torch: {type(model).__name__} cannot be traced by torch.export ({type(error).__name__}: {reason}); "
            "write its forward without steps that depend on the data"
        ) from error
    finally:
        noisy.setLevel(before)
    for node in program.graph.nodes:  # source lines and paths of this machine would be half of the archive
        node.meta = {key: node.meta[key] for key in ("val", "torch_fn") if key in node.meta}
    return program


def read(folder: Path) -> tuple[nn.Module, Tensor, Tensor]:
    """Returns the network of an archive, its golden images and their scores.

    Raises:
        QexpError: A file is missing or damaged.
    """
    try:
        vectors = load_file(folder / GOLDEN)
        with warnings.catch_warnings():
            # torch 2.11 remarks on its own way of reading the archive
            warnings.filterwarnings("ignore", message="The given buffer is not writable", category=UserWarning)
            network = torch.export.load(folder / ARCHIVE).module()
        return network, vectors["images"], vectors["scores"]
    except Exception as error:  # raised by the archive's reader, which documents no exceptions
        raise QexpError(
            f"{folder}: {ARCHIVE} or {GOLDEN} is missing, cut short or damaged ({type(error).__name__}: {error}); export the run again"
        ) from None
