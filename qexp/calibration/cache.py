"""Calibration statistics on disk, named by a hash of the weights, images and sites that they depend on; never of the method."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import fields, is_dataclass
from enum import Enum
from functools import partial
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from qexp.calibration.site_stats import Calibration, SiteStats
from qexp.layers.quantized import QUANTIZED, float_class, quantized_layers, quantizers
from qexp.numerics.granularity import PerChannel, PerTensor
from qexp.quantizers.base import Quantizer
from qexp.results import identity
from qexp.statistics.collectors import Collector
from qexp.statistics.stats import TensorStats
from qexp.system.whole_files import whole

log = logging.getLogger(__name__)
_VERSION = "4"  # version of the file's contents: raise it when the collected values change, so that every hash changes
_PLAIN = (
    bool | int | float | complex | str | bytes | range | None | Enum | torch.dtype | torch.device | torch.memory_format
)
_PASSING = {"training", "enabled", "baked_weight"}  # module attributes that do not affect the results in calibration


def tensor_hash(tensors: dict[str, Tensor] | Sequence[Tensor]) -> str:
    """Returns the SHA-256 of the names, shapes, dtypes and bytes of tensors."""
    digest = hashlib.sha256()
    items = tensors.items() if isinstance(tensors, dict) else enumerate(tensors)
    for name, tensor in items:
        t = tensor.detach().cpu().contiguous()
        digest.update(f"{name}{tuple(t.shape)}{t.dtype}".encode())
        digest.update(t.reshape(-1).view(torch.uint8).numpy().data if t.numel() else b"")
    return digest.hexdigest()


def content_hash(
    model: nn.Module, batches: Sequence[Tensor], channel_histograms: bool, collectors: Sequence[Collector] = ()
) -> str:
    """Returns the file name (a hash) for the statistics of this float model on these images."""
    own = {id(t) for _, _, q in quantizers(model) for t in [*q.parameters(), *q.buffers()]}
    weights = {k: v for k, v in [*model.named_parameters(), *model.named_buffers()] if id(v) not in own}
    carried = {id(layer.site(site)) for _, layer in quantized_layers(model) for site in layer.sites}
    modules = [  # whether a module's tensors are watched changes when a later version can quantize its class
        (name, *behaviour(m), float_class(m) in QUANTIZED) for name, m in model.named_modules() if id(m) not in carried
    ]
    names = [c.name for c in collectors]
    sources = [code_of(model), identity.code(collectors)]
    text = json.dumps(
        [_VERSION, modules, channel_histograms, *names, sources, tensor_hash(weights), tensor_hash(batches)]
    )
    return hashlib.sha256(text.encode()).hexdigest()[:24]


def code_of(model: nn.Module) -> dict[str, str]:
    """Returns a text per module that identifies the code of a float network: its classes and the functions they hold."""
    things: list[object] = []
    for module in model.modules():
        if isinstance(module, Quantizer):
            continue
        things.append(float_class(module))
        things += [held for key, held in vars(module).items() if callable(held) and key not in _PASSING]
    return identity.code(things)


def behaviour(module: nn.Module) -> tuple[str, dict[str, str]]:
    """Returns a module's float class and its settings that are not weights: stride, a switch or a function of its forward."""
    kind = float_class(module)
    settings = {k: _spelled(v) for k, v in sorted(vars(module).items()) if k[0] != "_" and k not in _PASSING}
    return f"{kind.__module__}.{kind.__qualname__}", settings


def _spelled(value: object, inside: frozenset[int] = frozenset()) -> str:
    """Returns a setting as text that is equal in every process: containers by their contents, functions by name and code."""
    if isinstance(value, _PLAIN):
        return repr(value)
    if isinstance(value, Tensor):
        return tensor_hash([value])
    if isinstance(value, np.ndarray):
        return f"{value.dtype}{value.shape}{hashlib.sha256(value.tobytes()).hexdigest()}"
    if id(value) in inside:  # the container holds itself
        return "..."
    inside |= {id(value)}
    if isinstance(value, partial):
        value = [value.func, value.args, value.keywords]
    elif is_dataclass(value) and not isinstance(value, type):
        value = [type(value), {f.name: getattr(value, f.name, None) for f in fields(value)}]
    if isinstance(value, dict):
        return f"{{{', '.join(sorted(f'{_spelled(k, inside)}: {_spelled(v, inside)}' for k, v in value.items()))}}}"
    if isinstance(value, set | frozenset):
        return f"{{{', '.join(sorted(_spelled(v, inside) for v in value))}}}"
    if isinstance(value, list | tuple):
        return f"({', '.join(_spelled(v, inside) for v in value)})"
    own = value if hasattr(value, "__qualname__") else type(value)
    name = f"{getattr(own, '__module__', None)}.{own.__qualname__}"
    code = getattr(value, "__code__", None)
    if code is None:
        return name
    held = [c for c in code.co_consts if not hasattr(c, "co_code")]
    for cell in getattr(value, "__closure__", None) or ():
        with suppress(ValueError):  # a closure cell without a value yet
            held.append(cell.cell_contents)
    return f"{name} {code.co_code.hex()} {code.co_names} {_spelled(held, inside)}"


def save_stats(calibration: Calibration, path: Path) -> None:
    """Writes all statistics to one safetensors file; the file is complete or not written."""
    tensors, sites = {}, []
    for i, (key, site) in enumerate(calibration.stats.items()):
        sites.append(key)
        for kind in ("tensor", "channel"):
            tensors |= {f"{i}/{kind}/{k}": v.contiguous() for k, v in getattr(site, kind).state().items()}
        tensors |= {f"{i}/extra/{k}": v.contiguous() for k, v in site.extra.items()}
    aliases = [[*key, *target] for key, target in calibration.aliases.items()]
    try:
        with whole(path) as part:
            save_file(tensors, part, metadata={"sites": json.dumps(sites), "aliases": json.dumps(aliases)})
    # A full or read-only disk must not fail this run; the next run calibrates again.
    except (OSError, SafetensorError) as error:
        log.warning("calibration statistics could not be written to %s: %s", path, error)


def load_stats(path: Path) -> Calibration | None:
    """Returns the statistics stored at `path`; None where there is no file or it is damaged."""
    if not path.exists():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            return _read(file.metadata(), {name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118
    except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
        log.warning("calibration statistics in %s are damaged (%s); calibrating again", path, error)
        return None


def _read(metadata: dict[str, str], tensors: dict[str, Tensor]) -> Calibration:

    parts: dict[int, dict[str, dict[str, Tensor]]] = {}
    for name, tensor in tensors.items():
        i, kind, key = name.split("/", 2)
        parts.setdefault(int(i), {"tensor": {}, "channel": {}, "extra": {}})[kind][key] = tensor
    stats = {
        tuple(key): SiteStats(
            TensorStats.from_state(parts[i]["tensor"], PerTensor()),
            TensorStats.from_state(parts[i]["channel"], PerChannel(1)),
            parts[i]["extra"],
        )
        for i, key in enumerate(json.loads(metadata["sites"]))
    }
    aliases = {(a, b): (c, d) for a, b, c, d in json.loads(metadata["aliases"])}
    return Calibration(stats, aliases)
