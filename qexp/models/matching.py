"""Finds a network's tensors in a checkpoint: searches every mapping and every prefix, and accepts only a complete fit."""

from __future__ import annotations

import logging
import re
from collections import Counter, OrderedDict
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qexp.errors import QexpError, near

log = logging.getLogger(__name__)

WRAPPERS = ("state_dict", "model_state_dict", "net_state_dict", "model", "net", "model_state")
PREFIXES = ("module.", "model.", "_orig_mod.")
SPARE = {
    "ema",
    "averaged",
    "average",
    "avg",
    "swa",
    "teacher",
    "target",
    "momentum",
}  # copies beside the trained network
# Left behind by tools that count operations or average weights.
COUNTED = ("total_ops", "total_params", "n_averaged")
DEPTH = 3  # largest depth of nested mappings, and of dots in a prefix
LOOKS = 2000  # largest number of mappings to search
SHOWN = 4  # number of names in an error; the others are counted

KeyMap = list[tuple[re.Pattern[str], str | None]]


@dataclass(frozen=True)
class Part:
    """Tensors of a file with their names in the network.

    Attributes:
        place: Keys of the mappings around them, `state_dict`.
        prefix: Prefix of their names, such as `module.`.
        state: Tensors by name.
        besides: Names of other tensors of the same mapping.
        versions: Versions of the modules in the file.
    """

    place: str
    prefix: str
    state: dict[str, Any]
    besides: tuple[str, ...]
    versions: Mapping[str, Any]

    @property
    def spare(self) -> bool:
        """Whether its name marks a copy beside the trained network."""
        return bool(SPARE & set(re.split(r"[^a-z]+", f"{self.place}.{self.prefix}".lower())))

    @property
    def name(self) -> str:
        return ", ".join(filter(None, (self.place, f"{self.prefix}*" if self.prefix else ""))) or "the file itself"


def match(content: Any, model: nn.Module, key_map: Mapping[str, str | None], where: str) -> OrderedDict[str, Any]:
    """Returns the state that `model.load_state_dict` takes strictly.

    A checkpoint may hold it alone or within mappings (`state_dict`, `net`, ...), below a prefix (`module.`, or the name a Lightning
    module gave the network), beside other tensors. Scales and clips of a quantized run are skipped; the function reads the float
    weights. BN counters that old files lack are filled in.

    Args:
        content: Content of the file.
        model: The network.
        key_map: Regular expression -> replacement for names, applied in order to names without prefix; None drops a name, with prefix
            or without.
        where: The file, for errors.

    Raises:
        QexpError: There are no weights, none fit, several networks fit, or values are not float weights.
    """
    own = model.state_dict()
    renames = _compiled(key_map)
    parts = [part for place, mapping in _mappings(content) for part in _parts(place, mapping, own, renames)]
    if not parts:
        raise QexpError(
            f"{where}: no weights in it; got {_listing(content)}; a state_dict is read, alone or in a mapping"
        )
    is_lightning = isinstance(content, Mapping) and "pytorch-lightning_version" in content
    whole = [part for part in parts if not _faults(part.state, own)]
    fitting = [part for part in whole if not part.besides or is_lightning]
    if whole and not fitting:
        raise _not_alone(whole[0], where)
    if not fitting:
        closest = max(parts, key=lambda part: (_agreement(part.state, own), -parts.index(part)))
        raise _misfit(closest, own, model, where)
    part = _chosen(fitting, own, is_lightning, where)
    if part.besides:
        log.info("%s: read %s; left out %s", where, part.name, listed(part.besides))
    state = OrderedDict((key, _checked(key, part.state[key], own[key], where)) for key in own)
    state._metadata = _versions(own, part.versions)
    return state


def _mappings(content: Any) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yields each mapping from names to tensors, with the keys of the mappings around it."""
    waiting, seen = [("", content)], set()
    while waiting and len(seen) < LOOKS:
        place, node = waiting.pop(0)
        if id(node) in seen or not isinstance(node, Mapping):
            continue
        seen.add(id(node))
        if any(isinstance(key, str) and isinstance(value, Tensor) for key, value in node.items()):
            yield place, node
        if place.count("/") < DEPTH - 1:
            inner = [(f"{place}/{key}".lstrip("/"), value) for key, value in node.items() if isinstance(key, str)]
            waiting += sorted(inner, key=lambda pair: WRAPPERS.index(pair[0]) if pair[0] in WRAPPERS else len(WRAPPERS))


def _parts(place: str, mapping: Mapping[str, Any], own: Mapping[str, Any], renames: KeyMap) -> Iterator[Part]:
    """Yields a mapping's tensors below each prefix that may hold the whole network; always without prefix and with common ones."""
    found = {
        key.replace("._orig_mod.", "."): value
        for key, value in mapping.items()
        if isinstance(key, str)
        and "_quantizer." not in key
        and (isinstance(value, Tensor) or key.endswith("_extra_state"))
    }
    below = Counter(
        key[: m.end()]
        for key in found
        for n, m in enumerate(re.finditer(r"\.", key))
        if n <= DEPTH and m.end() < len(key)
    )
    need = sum(not key.endswith("num_batches_tracked") for key in own)
    common = _common_prefix(found, own)
    prefixes = dict.fromkeys([common, "", *(prefix for prefix, count in below.items() if count >= need)])
    versions = getattr(mapping, "_metadata", None)
    dropped = {key for key in found if any(new is None and pattern.search(key) for pattern, new in renames)}
    for prefix in prefixes:
        kept = {key: value for key, value in found.items() if key.startswith(prefix) and key not in dropped}
        try:
            state = _renamed({key.removeprefix(prefix): value for key, value in kept.items()}, renames)
        except QexpError:
            if prefix not in ("", common):
                continue
            raise
        state = {k: v for k, v in state.items() if k in own or k.rpartition(".")[2] not in COUNTED}
        for key in own:
            counter_of = key.removesuffix("num_batches_tracked")
            if counter_of != key and key not in state and f"{counter_of}running_mean" in state:
                state[key] = own[key]
        outside = (key for key in found if not key.startswith(prefix) and key not in dropped)
        besides = tuple(key for key in outside if key.rpartition(".")[2] not in COUNTED)
        yield Part(place, prefix, state, besides, _below(versions, prefix))


def _common_prefix(found: Collection[str], own: Collection[str]) -> str:
    """Returns the known prefixes of every name that no name of the network begins with."""
    prefix, growing = "", True
    while growing:
        growing = False
        for more in PREFIXES:
            if (
                found
                and all(key.startswith(prefix + more) for key in found)
                and not any(k.startswith(more) for k in own)
            ):
                prefix, growing = prefix + more, True
    return prefix


def _compiled(key_map: Mapping[str, str | None]) -> KeyMap:
    out = []
    for pattern, replacement in key_map.items():
        if not isinstance(pattern, str) or not isinstance(replacement, str | None):
            raise QexpError(
                f"key_map: {pattern!r} -> {replacement!r} is not allowed; use pattern: replacement, or null to drop"
            )
        try:
            find = re.compile(pattern)
            find.sub(replacement or "", "")
        except (re.error, RecursionError, OverflowError) as error:
            raise QexpError(f"key_map: {pattern!r} -> {replacement!r} is not a regular expression ({error})") from error
        out.append((find, replacement))
    return out


def _renamed(state: dict[str, Any], renames: KeyMap) -> dict[str, Any]:
    for find, replacement in renames:
        out: dict[str, Any] = {}
        for key, value in state.items():
            if replacement is None and find.search(key):
                continue
            new = key if replacement is None else find.sub(replacement, key)
            if new in out:
                raise QexpError(f"key_map: {find.pattern!r} -> {replacement!r} gives two keys the name {new!r}")
            out[new] = value
        state = out
    return state


def _chosen(fitting: list[Part], own: Mapping[str, Any], is_lightning: bool, where: str) -> Part:
    """Returns the file's network if several places fit; copies named as teacher or average come last."""
    trained = [part for part in fitting if not part.spare] or fitting
    if is_lightning:  # in a Lightning checkpoint, the attribute `model` is the network
        trained = [part for part in trained if part.prefix == "model."] or trained
    first, *others = trained
    for other in others:
        if any(not _same(first.state[key], other.state[key]) for key in own):
            raise QexpError(
                f"{where}: several networks in it fit, and differ: {listed(part.name for part in trained)}; save the one you mean alone, "
                f"or drop the others with model.key_map: {{PATTERN: null}}"
            )
    if len(fitting) > len(trained):
        log.info("%s: read %s, not %s", where, first.name, listed(p.name for p in fitting if p not in trained))
    return first


def _same(a: Any, b: Any) -> bool:
    return a is b or (isinstance(a, Tensor) and isinstance(b, Tensor) and a.dtype == b.dtype and torch.equal(a, b))


def _shape(value: Any) -> list[int] | None:
    try:
        return list(value.shape)
    except (AttributeError, RuntimeError):  # no tensor, or a nested one
        return None


def _faults(state: Mapping[str, Any], own: Mapping[str, Any]) -> list[str]:
    """Returns why a state does not fit the network, in words."""
    missing, unexpected = [k for k in own if k not in state], [k for k in state if k not in own]
    shapes = [
        f"{k}: file {_shape(state[k])}, model {_shape(own[k])}"
        for k in own
        if k in state and isinstance(own[k], Tensor) and _shape(state[k]) != _shape(own[k])
    ]
    renamed = [] if 2 * len(missing) > len(own) else unexpected  # the names of another network do not help
    faults = [
        f"{len(missing)} missing: {listed(k + near(k, renamed, 1) for k in missing[:SHOWN])}{_more(missing)}"
        if missing
        else "",
        f"{len(unexpected)} unexpected: {listed(unexpected)}" if unexpected else "",
        f"{len(shapes)} of another shape: {listed(shapes)}" if shapes else "",
    ]
    return list(filter(None, faults))


def _agreement(state: Mapping[str, Any], own: Mapping[str, Any]) -> int:
    return sum(key in state and _shape(state[key]) == _shape(own[key]) for key in own)


def _misfit(part: Part, own: Mapping[str, Any], model: nn.Module, where: str) -> QexpError:
    inside = f" ({part.place})" if part.place and part.place not in WRAPPERS else ""
    return QexpError(
        f"{where}{inside} does not fit {type(model).__name__}. {'; '.join(_faults(part.state, own))}. "
        f"Check model= and its arguments (num_classes, shortcut, ...); where only names differ, give model.key_map"
        f"{_other_classes(part, own)}"
    )


def _other_classes(part: Part, own: Mapping[str, Any]) -> str:
    """Returns what to do where two networks differ in their number of classes alone."""
    if part.state.keys() != own.keys() or any(
        (_shape(part.state[k]) or [])[1:] != (_shape(v) or [])[1:] for k, v in own.items()
    ):
        return ""
    return "; to train a classifier for other classes, a network of torchvision or timm starts from a file: model.net.start=FILE"


def _not_alone(part: Part, where: str) -> QexpError:
    first = re.escape(part.besides[0].partition(".")[0])
    return QexpError(
        f"{where}: the network lies in {part.name}, and beside it tensors that it lacks: {listed(part.besides)}; a part of another "
        f'network would look so too. Where they are none of it, drop them: model.key_map={{"^{first}": null}}'
    )


def _checked(key: str, value: Any, own: Any, where: str) -> Any:
    """Returns a tensor in the type that the network needs.

    Raises:
        QexpError: Its type differs from the network's, or it holds values that are not finite.
    """
    if not isinstance(own, Tensor):
        return value
    if not isinstance(value, Tensor) or value is own:
        return value
    kinds = {
        "has no values (a meta tensor); save the network after it is filled": value.is_meta,
        "is a sparse tensor; save it dense: tensor.to_dense()": value.layout != torch.strided,
        "is a quantized tensor of PyTorch; save float weights: tensor.dequantize()": value.is_quantized,
    }
    if wrong := next((text for text, holds in kinds.items() if holds), None):
        raise QexpError(f"{where}: {key} {wrong}")
    value = value.detach()
    if own.dtype.is_floating_point and not value.dtype.is_floating_point:
        raise QexpError(
            f"{where}: {key} holds {_dtype(value)} values; the network has {_dtype(own)}, and only floating types can be weights: a "
            "network saved after it was converted has lost them"
        )
    is_whole = not own.dtype.is_floating_point and not own.dtype.is_complex
    if is_whole and value.dtype.is_floating_point and not torch.equal(value, value.round()):
        raise QexpError(
            f"{where}: {key} holds {_dtype(value)} values that are not whole; the network has {_dtype(own)}"
        )
    if value.dtype.is_complex != own.dtype.is_complex:
        raise QexpError(f"{where}: {key} holds complex values; the network has {_dtype(own)}")
    if own.dtype.is_floating_point:
        seen = value.to(own.dtype)
        strange = ~torch.isfinite(seen) & (seen != own.detach().cpu())  # a mask may hold infinities
        if strange.any():
            raise QexpError(
                f"{where}: {key} holds {int(strange.sum()):,} of {seen.numel():,} values that are not finite (nan or inf) as "
                f"{_dtype(own)}; the training that wrote it diverged, or the file is damaged"
            )
        if key.endswith("running_var") and (seen < 0).any():
            raise QexpError(f"{where}: {key} holds negative variances; the file is damaged")
    return value


def _dtype(value: Tensor) -> str:
    return str(value.dtype).removeprefix("torch.")


def _below(versions: Any, prefix: str) -> dict[str, Any]:
    """Returns the entries of modules below a prefix, without it."""
    if not isinstance(versions, Mapping):
        return {}
    return {
        f"{name}."[len(prefix) :].rstrip("."): entry
        for name, entry in versions.items()
        if f"{name}.".startswith(prefix)
    }


def _versions(own: Mapping[str, Any], versions: Mapping[str, Any]) -> OrderedDict[str, Any]:
    """Returns the module versions, from the file if it has them: the layout of a module depends on its version."""
    out = OrderedDict()
    for name, entry in getattr(own, "_metadata", {}).items():
        said = versions.get(name)
        version = said.get("version") if isinstance(said, Mapping) else None
        out[name] = {**entry, "version": version} if isinstance(version, int) else dict(entry)
    return out


def _listing(content: Any) -> str:
    keys = ", ".join(repr(key)[:40] for key in list(content)[:8]) if isinstance(content, Mapping) else ""
    return f"the keys {keys}" if keys else type(content).__name__


def _more(names: Collection[str]) -> str:
    return f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""


def listed(names: Collection[str] | Iterator[str]) -> str:
    """Returns the first names and the number of the others."""
    names = list(names)
    return ", ".join(names[:SHOWN]) + _more(names)
