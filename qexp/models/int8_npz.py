"""Weights kept as 8-bit codes in an `.npz`: `LAYER.q` int8 codes, `LAYER.s` scale, `LAYER.b` bias, batch norm folded."""

from __future__ import annotations

import math
import zipfile
from pathlib import Path

import numpy as np
import torch
from numpy.lib import format as npy
from numpy.typing import NDArray
from torch import Tensor, nn

from qexp.errors import QexpError, near
from qexp.models.checkpoints import check_size
from qexp.models.norms import identity_norm, norm_after


def read_int8(path: Path, model: nn.Module, room: int) -> dict[str, Tensor]:
    """The float state of `model` with the weights `q * s` of the file.

    A layer without a bias of its own is followed by a batch norm in the order of registration: that one becomes the
    identity plus the bias (`weight = sqrt(1 + eps)` on a variance of 1), so that the network computes the folded result.

    Args:
        path: The file.
        model: The network.
        room: Bytes that the arrays may take in memory, if that is more than twice the size of the file.

    Raises:
        QexpError: The file is missing or damaged, layers or shapes differ from the network's, or a scale is not allowed.
    """
    arrays = _arrays(path, room)
    stored = sorted({name.rpartition(".")[0] for name in arrays})
    wrong = [name for name in arrays if name.rpartition(".")[2] not in ("q", "s", "b")]
    lacking = [f"{k}.{part}" for k in stored for part in "qsb" if f"{k}.{part}" not in arrays]
    if wrong or lacking:
        what = f"lacks {lacking[0]}" if lacking else f"holds {wrong[0]}"
        raise QexpError(f"{path}: {what}; an .npz of weights holds LAYER.q, LAYER.s and LAYER.b of every layer")
    layers = {n: m for n, m in model.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)}
    foreign = [k for k in stored if k not in layers] or [k for k in layers if k not in stored]
    if foreign:
        raise QexpError(
            f"{path} does not fit {type(model).__name__}: layer {foreign[0]} is in one of them only"
            f"{near(foreign[0], list(layers) + stored, 1)}; check model= and its arguments"
        )
    state = {key: value.clone() for key, value in model.state_dict().items()}
    norms = norm_after(model)
    for name, layer in layers.items():
        codes, scale, bias = arrays[f"{name}.q"], arrays[f"{name}.s"], arrays[f"{name}.b"]
        out = layer.weight.shape[0]
        if codes.dtype != np.int8 or codes.shape != tuple(layer.weight.shape) or bias.shape != (out,):
            raise QexpError(
                f"{path}: {name} is {codes.dtype} {list(codes.shape)} with {list(bias.shape)} biases; the network has "
                f"int8 {list(layer.weight.shape)} and {out}"
            )
        if scale.size not in (1, out):
            raise QexpError(f"{path}: {name} has {scale.size} scales; 1 or {out} are allowed")
        for part, values in (("s", scale), ("b", bias)):
            _check_numbers(f"{path}: {name}.{part}", values, positive=part == "s")
        scale = scale.reshape(-1, *[1] * (codes.ndim - 1)).astype(np.float32)
        state[f"{name}.weight"] = torch.from_numpy(codes.astype(np.float32) * scale)
        shift = torch.from_numpy(bias.astype(np.float32))
        if layer.bias is not None:
            state[f"{name}.bias"] = shift
        elif name in norms:
            norm, eps = norms[name]
            state |= {f"{norm}.{part}": value for part, value in identity_norm(shift, eps).items()}
        elif bias.any():
            raise QexpError(f"{path}: {name} has a bias, but the network gives it neither a bias nor a batch norm")
    return state


def _arrays(path: Path, room: int) -> dict[str, NDArray]:
    """Returns the arrays of an `.npz` after checking the claims of its headers."""
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
            check_size(path, sum(entry.file_size for entry in entries), room)
            for entry in entries:
                with archive.open(entry) as file:
                    _check_header(file, entry.file_size)
        with path.open("rb") as raw, np.load(raw, allow_pickle=False) as file:
            return {name: file[name] for name in file.files}
    except QexpError:
        raise
    except Exception as error:  # the bytes come from anywhere: the readers may raise anything for a wrong byte
        raise QexpError(
            f"{path}: damaged or truncated ({type(error).__name__}: {error}); fetch or write it again"
        ) from error


def _check_header(file: zipfile.ZipExtFile, size: int) -> None:
    """Checks that an array's header claims no more bytes than the file holds for it."""
    major, _ = npy.read_magic(file)
    read = {1: npy.read_array_header_1_0, 2: npy.read_array_header_2_0}.get(major)
    if read is None:
        raise ValueError(f"an array of format {major}")
    shape, _, dtype = read(file)
    if any(n < 0 for n in shape) or math.prod(shape) * dtype.itemsize > size:
        raise ValueError(f"an array claims to be {dtype} {list(shape)} in {size:,} bytes")


def _check_numbers(where: str, values: NDArray, positive: bool) -> None:
    if values.dtype.kind not in "fiu":
        raise QexpError(f"{where} holds {values.dtype} values; real numbers are allowed")
    with np.errstate(over="ignore"):
        seen = values.astype(np.float32)
    if not np.isfinite(seen).all() or (positive and (seen <= 0).any()):
        raise QexpError(f"{where} holds {'scales that are not positive and finite' if positive else 'nan or inf'}")
