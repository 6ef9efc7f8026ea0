"""Files of a CAQ network as the FPGA tool reads them: exponents as text, maps of maxima as floats, power-of-two weights as 4-bit codes."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from qexp.calibration.site_stats import Calibration
from qexp.errors import QexpError
from qexp.layers.quantized import quantizers
from qexp.quantizers.caq import CAQShift
from qexp.quantizers.power_of_two import INQ

ZERO, UNUSED, POSITIVE = 7, 15, 8  # 4-bit codes: zero, none, and the bit of a positive weight
_EXPONENTS = 7  # that 3 bits hold beside zero
_ELEMENT = 4  # bits of an element, in the header
_BYTE_ZERO, _BYTE_NEGATIVE = 0x40, 0x80


def exponents(model: nn.Module) -> dict[str, list[int]]:
    """Returns the exponents of every tensor with power-of-two scales, channel by channel, in order of the network's layers."""
    return {f"{n}.{site}": q.exponents.tolist() for n, site, q in quantizers(model) if isinstance(q, CAQShift)}


def write_exponents(path: Path, vectors: Mapping[str, Sequence[int]]) -> None:
    """Writes one line a layer: integers in the order of the channels, separated by spaces."""
    path.write_text("".join(" ".join(map(str, vector)) + "\n" for vector in vectors.values()))


def read_exponents(path: Path) -> list[list[int]]:
    """Returns the lines of a file of exponents."""
    try:
        return [[int(word) for word in line.split()] for line in path.read_text().splitlines()]
    except ValueError as error:
        raise QexpError(f"{path}: a line of exponents holds integers separated by spaces ({error})") from None


def write_features(folder: Path, calibration: Calibration) -> dict[str, tuple[int, ...]]:
    """Writes each tensor's map of maxima `[C, H, W]` to `<layer>.<site>.bin` (float32, little endian, C order); returns their shapes.

    Raises:
        QexpError: Calibration did not collect the maps.
    """
    maps = {f"{n}.{site}": seen.extra.get("max_map") for (n, site), seen in calibration.stats.items()}
    if not maps or any(m is None for m in maps.values()):
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
            f"{int(bad.sum())} of {w.size} weights, such as {w[bad][0]:g}, are none of the powers of two that 4-bit codes "
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

    Four codes a word for 1x1 kernels, along the input channels; else the codes of a kernel row, at most three (2x2: two).
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
    """Writes a layer's weights: a header of six little-endian int32 (n2, bits of an element, N, C, H, W), then the words."""
    weight = weight if weight.ndim == 4 else weight.reshape(*weight.shape[:2], 1, 1)
    header = np.array([n2, _ELEMENT, *weight.shape], dtype="<i4")
    path.write_bytes(header.tobytes() + pack(weight, n2).tobytes())


def read_weight(path: Path) -> Tensor:
    """Returns the weight `[N, C, H, W]` of a file."""
    data = path.read_bytes()
    n2, element, *shape = np.frombuffer(data[:24], dtype="<i4").tolist() if len(data) >= 24 else [0, 0]
    if element != _ELEMENT:
        raise QexpError(f"{path}: elements of {element} bits, expected {_ELEMENT}; this is no file of 4-bit weights")
    return unpack(np.frombuffer(data[24:], dtype="<u2"), tuple(shape), n2)


def engine_bytes(weight: Tensor, n2: int) -> np.ndarray:
    """Returns the engine's form of each weight, uint8: 0x40 for zero, else `e - n2` in the low bits and 0x80 where negative."""
    code = codes(weight, n2)
    return np.where(
        code == ZERO, _BYTE_ZERO, (code & 7) | np.where(code & POSITIVE, 0, _BYTE_NEGATIVE).astype(np.uint8)
    ).astype(np.uint8)


def export(model: nn.Module, folder: Path, calibration: Calibration | None = None) -> list[Path]:
    """Writes a network's files, in place of earlier ones, and returns their paths.

    `exponents.txt` has a line for each tensor with power-of-two scales, `layers.txt` their names, in the same order;
    `weights/<layer>.bin` the INQ weights, as the network computes with them; `features/<layer>.<site>.bin` the maps of maxima, if given.
    """
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    found = exponents(model)
    write_exponents(folder / "exponents.txt", found)
    (folder / "layers.txt").write_text("".join(name + "\n" for name in found))
    for name, (q, weight) in _weights(model).items():
        (folder / "weights").mkdir(exist_ok=True)
        try:
            write_weight(folder / "weights" / f"{name}.bin", weight, int(q.n1.min()) - q.count + 1)
        except QexpError as error:
            raise QexpError(f"{name}: {error}") from None
    if calibration is not None:
        write_features(folder / "features", calibration)
    return sorted(p for p in folder.rglob("*") if p.is_file())


def refuse(model: nn.Module) -> None:
    """Raises for a network the FPGA tool has no form of, naming the tensors.

    Raises:
        QexpError: No tensor has power-of-two scales, or a weight is neither float nor INQ.
    """
    other = [f"{n}.{site}" for n, site, q in quantizers(model) if site == "weight" and not isinstance(q, INQ)]
    if not exponents(model) or other:
        reason = f"{', '.join(other[:4])} are no INQ weights" if other else "no tensor has CAQ exponents"
        raise QexpError(
            f"export=fpga: {reason}; the FPGA tool reads power-of-two exponents and weights: run quant=caq_shift, or quant=inq "
            "or inq_shift with 4-bit weights (bits=w4a8)"
        )


def check(model: nn.Module, folder: Path) -> dict[str, int]:
    """Returns what a folder's files hold, after comparing them with the network: `tensors`, `layers`, `weight_bytes`.

    Raises:
        QexpError: An exponent or a weight that was read back is not the network's; its file is named.
    """
    found = exponents(model)
    lines, names = read_exponents(folder / "exponents.txt"), (folder / "layers.txt").read_text().split()
    for name, line in zip(names, lines, strict=True):
        if line != found.get(name):
            raise QexpError(f"{folder / 'exponents.txt'}: the exponents of {name} are not the network's")
    weights, size = _weights(model), 0
    for name, (_, weight) in weights.items():
        path = folder / "weights" / f"{name}.bin"
        if not torch.equal(read_weight(path).reshape(weight.shape), weight.float()):
            raise QexpError(f"{path}: the weights are not the network's")
        size += path.stat().st_size
    return {"tensors": len(lines), "layers": len(weights), "weight_bytes": size}


@torch.no_grad()
def _weights(model: nn.Module) -> dict[str, tuple[INQ, Tensor]]:
    """Returns, by layer, the quantizer of each INQ weight and the weight as the network computes with it."""
    found = [(name, q) for name, site, q in quantizers(model) if isinstance(q, INQ) and site == "weight"]
    return {name: (q, q(model.get_submodule(name).weight)) for name, q in found}
