"""Files of a CAQ network for the FPGA tool: exponents as text, maps of maxima as floats, power-of-two weights as 4-bit codes."""

from __future__ import annotations

import shutil
import struct
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from qexp.calibration.site_stats import Calibration
from qexp.errors import QexpError
from qexp.integer.caq_order import Held, held, in_order
from qexp.layers.quantized import Quantized, quantizers
from qexp.network.facts import Facts
from qexp.quantizers.power_of_two import INQ

ZERO, UNUSED, POSITIVE = 7, 15, 8  # 4-bit codes: zero, none, and the bit of a positive weight
_EXPONENTS = 7  # exponents that 3 bits hold beside zero
HEADER = struct.Struct("<bb4h")  # least exponent, type of the elements, N, C, H, W
WORDS, FLOATS = 0, 1  # types of elements: 16-bit words of 4-bit codes, or float32
_BYTE_ZERO, _BYTE_NEGATIVE = 0x40, 0x80


def write_exponents(path: Path, vector: Sequence[int]) -> None:
    """Writes a tensor's exponents, or those of several one after the other: one integer per line, in the order of the channels."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{exponent}\n" for exponent in vector))


def read_exponents(path: Path) -> list[int]:
    """Returns the integers of a file of exponents."""
    try:
        return [int(line) for line in path.read_text().split()]
    except ValueError as error:
        raise QexpError(f"{path}: a file of exponents holds one integer per line ({error})") from None


def write_features(folder: Path, tensors: Sequence[Held], calibration: Calibration) -> dict[str, tuple[int, ...]]:
    """Writes each tensor's map of maxima `[C, H, W]` to `<name>.bin` (float32, little endian, C order); returns their shapes.

    Raises:
        QexpError: Calibration did not collect the maps.
    """
    maps = {t.name: calibration[t.site].extra.get("max_map") for t in tensors if t.site in calibration}
    if len(maps) < len(tensors) or any(m is None for m in maps.values()):
        raise QexpError(
            "calibration holds no maps of maxima; collect them: collect(model, batches, collectors=(MaxMap(),))"
        )
    folder.mkdir(parents=True, exist_ok=True)
    for name, m in maps.items():
        m.contiguous().numpy().astype("<f4").tofile(folder / f"{name}.bin")
    return {name: tuple(m.shape) for name, m in maps.items()}


def read_feature(path: Path, shape: tuple[int, ...]) -> Tensor:
    """Returns a map of maxima."""
    values = np.fromfile(path, dtype="<f4")
    if values.size != int(np.prod(shape)):
        raise QexpError(f"{path}: holds {values.size} numbers, the shape {shape} has {int(np.prod(shape))}")
    return torch.from_numpy(values.astype(np.float32)).reshape(shape)


def codes(weight: Tensor, n2: int) -> np.ndarray:
    """Returns the 4-bit code of each weight, uint8: `e - n2` (0..6), plus 8 where positive; 7 for zero.

    Raises:
        QexpError: A weight that is neither zero nor a power of two between 2^n2 and 2^(n2 + 6).
    """
    w = weight.detach().double().cpu().numpy()
    mantissa, exponent = np.frexp(np.abs(w))
    place = exponent - 1 - n2
    bad = (w != 0) & ((mantissa != 0.5) | (place < 0) | (place >= _EXPONENTS))
    if bad.any():
        raise QexpError(
            f"{int(bad.sum())} of {w.size} weights, such as {w[bad][0]:g}, are not among the powers of two that 4-bit codes "
            f"hold, 2^{n2}..2^{n2 + _EXPONENTS - 1}; "
            "run the recipe with 4-bit weights (bits=w4a8)"
        )
    return np.where(w == 0, ZERO, place + POSITIVE * (w > 0)).astype(np.uint8)


def values(code: np.ndarray, n2: int) -> Tensor:
    """Returns the weights of 4-bit codes, float32."""
    magnitude = np.exp2((code & 7).astype(np.float64) + n2)
    return torch.from_numpy(
        np.where(code == ZERO, 0.0, np.where(code & POSITIVE, magnitude, -magnitude)).astype(np.float32)
    )


def _groups(width: int) -> list[int]:
    """Returns how many codes of a kernel row share a word: rows of 2 two, of 3 three, of 5 three and two, of 7 three, three and one."""
    return [2] if width == 2 else [min(3, width - i) for i in range(0, width, 3)]


def pack(weight: Tensor, n2: int) -> np.ndarray:
    """Returns the 16-bit words of a weight `[N, C, H, W]`, the first code in the lowest bits, nibbles without a code 15.

    Four codes per word for 1x1 kernels, along the input channels; else the codes of a kernel row, at most three (2x2: two).
    """
    code = codes(weight, n2).astype(np.uint16)
    n, c, h, w = code.shape
    if (h, w) == (1, 1):
        rows = np.pad(code.reshape(n, c), ((0, 0), (0, -c % 4)), constant_values=UNUSED).reshape(n, -1, 4)
    else:
        rows, start = [], 0
        for size in _groups(w):
            part = code[..., start : start + size]
            rows.append(np.pad(part, ((0, 0),) * 3 + ((0, 4 - size),), constant_values=UNUSED))
            start += size
        rows = np.stack(rows, axis=3)
    return (rows << np.array([0, 4, 8, 12], dtype=np.uint16)).sum(-1).astype("<u2").reshape(-1)


def unpack(words: np.ndarray, shape: tuple[int, int, int, int], n2: int) -> Tensor:
    """Returns the weight `[N, C, H, W]` of 16-bit words, float32."""
    n, c, h, w = shape
    nibbles = (words.astype(np.uint16)[:, None] >> np.array([0, 4, 8, 12], dtype=np.uint16)) & 15
    if (h, w) == (1, 1):
        code = nibbles.reshape(n, -1)[:, :c].reshape(shape)
    else:
        groups = _groups(w)
        rows = nibbles.reshape(n, c, h, len(groups), 4)
        code = np.concatenate([rows[..., i, :size] for i, size in enumerate(groups)], axis=-1)
    return values(code, n2)


def write_weight(path: Path, weight: Tensor, n2: int) -> None:
    """Writes a layer's weights: its header (least exponent, element 0, N, C, H, W), then the words of 4-bit codes."""
    weight = weight if weight.ndim == 4 else weight.reshape(*weight.shape[:2], 1, 1)
    path.write_bytes(_header(path, n2, WORDS, tuple(weight.shape)) + pack(weight, n2).tobytes())


def write_floats(path: Path, values: Tensor) -> None:
    """Writes a vector `[N]` other than a weight of a convolution or linear layer: header (0, element 1, N, 1, 1, 1), then float32."""
    shape = (*values.shape, 1, 1, 1, 1)[:4]
    path.write_bytes(_header(path, 0, FLOATS, shape) + values.detach().cpu().numpy().astype("<f4").tobytes())


def _header(path: Path, n2: int, element: int, shape: tuple[int, ...]) -> bytes:
    try:
        return HEADER.pack(n2, element, *shape)
    except struct.error:
        raise QexpError(
            f"{path.stem}: exponent {n2} and shape {list(shape)} do not fit the header of CAQ's files, one signed byte and 16 bits per size"
        ) from None


def read_weight(path: Path) -> Tensor:
    """Returns the weight `[N, C, H, W]` of a file, or the floats of one that holds floats."""
    data = path.read_bytes()
    n2, element, *shape = HEADER.unpack(data[: HEADER.size]) if len(data) >= HEADER.size else (0, -1)
    if element == FLOATS:
        return torch.from_numpy(np.frombuffer(data[HEADER.size :], dtype="<f4").astype(np.float32)).reshape(shape)
    if element != WORDS:
        raise QexpError(
            f"{path}: element type {element}, expected 0 (4-bit codes) or 1 (floats); this is not a file of weights"
        )
    return unpack(np.frombuffer(data[HEADER.size :], dtype="<u2"), tuple(shape), n2)


def engine_bytes(weight: Tensor, n2: int) -> np.ndarray:
    """Returns the engine's form of each weight, uint8: 0x40 for zero, else `e - n2` in the low bits and 0x80 where negative."""
    code = codes(weight, n2)
    return np.where(
        code == ZERO, _BYTE_ZERO, (code & 7) | np.where(code & POSITIVE, 0, _BYTE_NEGATIVE).astype(np.uint8)
    ).astype(np.uint8)


def export(
    model: nn.Module, facts: Facts, folder: Path, net: str, calibration: Calibration | None = None
) -> list[Path]:
    """Writes a network's files, in place of earlier ones, and returns their paths.

    `<net>_q` holds the exponents of all tensors of the engine (see `held`), one after the other, and `channel_q/<net>/<name>` those of
    each; `layers.txt` names them in order, `exponents.txt` has a line for each. `weights/<layer>.bin` are the INQ weights as the
    network computes with them, `weights/<layer>.bias.bin` and `weights/<batch norm>.<what>.bin` what is float beside them; `param.bin` all
    of it as floats (see `parameters`); `features/<net>/<name>.bin` the maps of maxima, if given.
    """
    tensors = held(model, facts)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for tensor in tensors:
        write_exponents(folder / "channel_q" / net / tensor.name, tensor.exponents)
    write_exponents(folder / f"{net}_q", [e for tensor in tensors for e in tensor.exponents])
    (folder / "exponents.txt").write_text("".join(" ".join(map(str, t.exponents)) + "\n" for t in tensors))
    (folder / "layers.txt").write_text("".join(f"{tensor.name}\n" for tensor in tensors))
    parts = parameters(model, facts)
    (folder / "param.bin").write_bytes(b"".join(v.numpy().astype("<f4").tobytes() for v in parts.values()))
    inq = _weights(model)
    for name, value in parts.items() if inq else ():
        layer = name.rpartition(".")[0]
        (folder / "weights").mkdir(exist_ok=True)
        if name == f"{layer}.weight" and layer in inq:
            q = inq[layer]
            try:
                write_weight(folder / "weights" / f"{layer}.bin", value, int(q.n1.min()) - q.count + 1)
            except QexpError as error:
                raise QexpError(f"{layer}: {error}") from None
        elif value.ndim == 1:
            write_floats(folder / "weights" / f"{name}.bin", value)
    if calibration is not None:
        write_features(folder / "features" / net, tensors, calibration)
    return sorted(p for p in folder.rglob("*") if p.is_file())


@torch.no_grad()
def parameters(model: nn.Module, facts: Facts) -> dict[str, Tensor]:
    """Returns the parameters of the engine, float32, in the order of its layers.

    For each weighted layer its weight as the network computes with it, its bias if it has one, and of a batch norm that follows mean,
    variance, factor and offset.
    """
    out: dict[str, Tensor] = {}
    for name in in_order(model, facts):
        layer = model.get_submodule(name)
        quantized = isinstance(layer, Quantized)
        out[f"{name}.weight"] = layer.quantized_weight() if quantized else layer.weight
        if layer.bias is not None:
            out[f"{name}.bias"] = layer.quantized_bias() if quantized else layer.bias
        norm = facts.bn_of.get(name)
        for what in ("running_mean", "running_var", "weight", "bias") if norm else ():
            out[f"{norm}.{what}"] = getattr(model.get_submodule(norm), what)
    return {name: value.detach().float().cpu() for name, value in out.items()}


def refuse(model: nn.Module, facts: Facts) -> None:
    """Raises, naming the tensors, if the FPGA tool has no form for the network.

    Raises:
        QexpError: A tensor of the engine has no power-of-two scales, or a weight is neither float nor INQ.
    """
    other = [f"{n}.{site}" for n, site, q in quantizers(model) if site == "weight" and not isinstance(q, INQ)]
    if other:
        raise QexpError(
            f"export=fpga: {', '.join(other[:4])} are not INQ weights; the FPGA tool reads power-of-two exponents and weights: run "
            "quant=caq_shift, or quant=inq with 4-bit weights (bits=w4a8)"
        )
    held(model, facts)


def check(model: nn.Module, facts: Facts, folder: Path, net: str) -> dict[str, int]:
    """Returns what a folder's files hold, after comparing them with the network: `tensors`, `layers`, `weight_bytes`.

    Raises:
        QexpError: An exponent or a weight in a file differs from the network's; the message names the file.
    """
    tensors, parts, inq = held(model, facts), parameters(model, facts), _weights(model)
    together = read_exponents(folder / f"{net}_q")
    for tensor in tensors:
        path = folder / "channel_q" / net / tensor.name
        own, together = together[: len(tensor.exponents)], together[len(tensor.exponents) :]
        if not tuple(read_exponents(path)) == tuple(own) == tensor.exponents:
            raise QexpError(f"{path}: the exponents of {tensor.name} are not the network's")
    if together or (folder / "layers.txt").read_text().split() != [tensor.name for tensor in tensors]:
        raise QexpError(f"{folder / f'{net}_q'}: holds other tensors than the network's")
    values = np.fromfile(folder / "param.bin", dtype="<f4")
    if not np.array_equal(values, np.concatenate([v.numpy().ravel() for v in parts.values()]), equal_nan=True):
        raise QexpError(f"{folder / 'param.bin'}: the parameters are not the network's")
    size = 0
    for name in inq:
        path, weight = folder / "weights" / f"{name}.bin", parts[f"{name}.weight"]
        if not torch.equal(read_weight(path).reshape(weight.shape), weight):
            raise QexpError(f"{path}: the weights are not the network's")
        size += path.stat().st_size
    return {"tensors": len(tensors), "layers": len(inq), "weight_bytes": size}


def _weights(model: nn.Module) -> dict[str, INQ]:
    """Returns, by layer, the quantizer of each INQ weight."""
    return {name: q for name, site, q in quantizers(model) if isinstance(q, INQ) and site == "weight"}
