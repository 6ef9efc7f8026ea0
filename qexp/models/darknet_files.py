"""Darknet's two files: the network as sections of options (`.cfg`), and its numbers in one stream (`.weights`)."""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from qexp.errors import QexpError


class Section(NamedTuple):
    """One `[name]` of a `.cfg` with its options as text; `line` is where it starts."""

    name: str
    options: dict[str, str]
    line: int

    def number(self, key: str, default: float | None = None) -> float:
        """Returns an option as a number."""
        text = self.options.get(key)
        if text is None and default is not None:
            return default
        try:
            return float(text)
        except (TypeError, ValueError):
            raise QexpError(f"[{self.name}] in line {self.line}: {key}={text}; a number is needed") from None

    def whole(self, key: str, default: int | None = None) -> int:
        """Returns an option as an integer."""
        return int(self.number(key, default))

    def numbers(self, key: str) -> list[float]:
        """Returns an option that lists numbers."""
        try:
            return [float(v) for v in self.options[key].split(",") if v.strip()]
        except (KeyError, ValueError):
            raise QexpError(
                f"[{self.name}] in line {self.line}: {key}={self.options.get(key)}; numbers separated by commas are needed"
            ) from None


def read_cfg(path: str | Path) -> list[Section]:
    """Returns the sections of a `.cfg` in order; the first one describes the input.

    Raises:
        QexpError: The file is missing or does not start with `[net]`, or a line is not an option.
    """
    path = Path(path)
    if not path.is_file():
        raise QexpError(f"{path}: no such file; name the detector's .cfg with model.cfg=FILE")
    sections: list[Section] = []
    for number, raw in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), 1):
        line = re.split("[#;]", raw, maxsplit=1)[0].strip()
        if line.startswith("[") and line.endswith("]"):
            sections.append(Section(line[1:-1].strip().lower(), {}, number))
        elif line:
            key, equals, value = (part.strip() for part in line.partition("="))
            if not equals or not sections:
                raise QexpError(f"{path}, line {number}: {raw.strip()!r} is neither [section] nor key=value")
            sections[-1].options[key] = value
    if not sections or sections[0].name not in ("net", "network"):
        raise QexpError(f"{path}: starts with {sections[0].name if sections else 'nothing'!r}; [net] is needed")
    return sections


def read_weights(path: str | Path, layers: list[tuple[str, nn.Module]]) -> dict[str, Tensor]:
    """Returns the numbers of a `.weights` file under the names of a network's convolutions and batch norms.

    The stream holds, for each convolution in order: the batch norm's bias, weight, mean and variance (or, without one, the
    convolution's bias), then the convolution's weight.

    Args:
        path: The file: three int32 (major, minor, revision), the number of images seen (int64 from version 0.2 on, int32 before),
            then float32.
        layers: Name and module of each convolution and batch norm in the order of the `.cfg`, a batch norm after its convolution.

    Raises:
        QexpError: The file holds fewer or more numbers than the network.
    """
    raw = Path(path).read_bytes()
    if len(raw) < 16:
        raise QexpError(f"{path}: {len(raw)} bytes are not a .weights file; fetch it again")
    major, minor = (int(v) for v in np.frombuffer(raw[:8], "<i4"))
    header = 20 if major * 10 + minor >= 2 else 16
    numbers = torch.from_numpy(np.frombuffer(raw, "<f4", offset=header, count=(len(raw) - header) // 4).copy())
    state: dict[str, Tensor] = {}
    at = 0

    def take(name: str, shape: torch.Size) -> None:
        nonlocal at
        state[name] = numbers[at : at + shape.numel()].reshape(shape) if at + shape.numel() <= len(numbers) else None
        at += shape.numel()

    for place, (name, layer) in enumerate(layers):
        if not isinstance(layer, nn.Conv2d):
            continue
        after = layers[place + 1] if place + 1 < len(layers) else ("", None)
        if isinstance(after[1], nn.BatchNorm2d):
            for part in ("bias", "weight", "running_mean", "running_var"):
                take(f"{after[0]}.{part}", after[1].weight.shape)
            state[f"{after[0]}.num_batches_tracked"] = torch.zeros((), dtype=torch.int64)
        else:
            take(f"{name}.bias", layer.bias.shape)
        take(f"{name}.weight", layer.weight.shape)
    if at != len(numbers) or (len(raw) - header) % 4:
        short = "cut short or " if at > len(numbers) else ""
        raise QexpError(
            f"{path}: holds {len(numbers):,} numbers, the network has {at:,}; the file is {short}of another .cfg"
        )
    return state
