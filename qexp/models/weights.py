"""Float weights from wherever they are kept, loaded strictly: a file, a torchvision name, a URL, a finished run.

Nothing is unpickled but tensors (`weights_only=True`, or safetensors), and every key must fit.
"""

import hashlib
import http.client
import os
import pickle
import pickletools
import re
import urllib.request
import zipfile
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm import tqdm

from qexp.errors import QexpError, near
from qexp.models.int8_npz import read_int8

SUFFIXES = (".safetensors", ".pt", ".pth", ".th", ".ckpt")
WRAPPERS = ("state_dict", "model_state_dict", "net_state_dict", "model")
PREFIXES = ("module.", "model.", "_orig_mod.")
SHOWN = 4  # names an error lists before it only counts


@dataclass(frozen=True)
class WeightsRecord:
    """Where a model's weights came from: the source as given, the sha256 of the file, and its kind."""

    source: str
    sha256: str
    kind: str  # file | torchvision | url | run


def load_weights(
    model: nn.Module,
    source: str | Path,
    key_map: Mapping[str, str | None] | None = None,
    cache_dir: str | Path | None = None,
) -> WeightsRecord:
    """Loads `source` into `model` strictly and returns what was loaded.

    Args:
        model: The float network; its own keys decide which prefixes are stripped, its `weight_readers` read formats of its own.
        source: A file (`.safetensors`, `.pt`, `.pth`, `.th`, `.ckpt`, or `.npz` of 8-bit codes); a run folder, whose
            last checkpoint is taken; a torchvision weight name (`ResNet18_Weights.IMAGENET1K_V1`, or
            `IMAGENET1K_V1` for a torchvision model); or `https://...#sha256=<hex>`.
        key_map: Regular expression -> replacement for the file's keys, applied in order; `None` drops the key.
        cache_dir: Where downloads are kept; `$QEXP_DATA_DIR/weights` by default, or `data/weights` without it.

    Raises:
        QexpError: The source is not there, damaged, refused, or does not fit.
    """
    source = str(source)
    cache = Path(cache_dir) if cache_dir else Path(os.environ.get("QEXP_DATA_DIR", "data")) / "weights"
    if re.match(r"https?://", source):
        path, kind = _from_url(source, cache), "url"
    elif Path(source).is_dir():
        path, kind = _from_run(Path(source)), "run"
    elif Path(source).is_file():
        path, kind = Path(source), "file"
    elif re.fullmatch(r"(\w+_Weights\.)?[A-Z][A-Z0-9_]*", source):
        path, kind = _from_torchvision(source, model, cache), "torchvision"
    else:
        raise _not_found(source)
    own = getattr(model, "weight_readers", {})  # by file ending: what a network reads in a format of its own
    if path.suffix in own:
        found = own[path.suffix](path)
    else:
        found = read_int8(path, model) if path.suffix == ".npz" else read_state(path)
    state = fit_keys(found, model.state_dict(), key_map or {})
    _check(model, state, source)
    model.load_state_dict(state, strict=True)
    return WeightsRecord(source, sha256(path), kind)


def save_weights(model: nn.Module, path: str | Path) -> None:
    """Writes the model's `state_dict` as safetensors; the file is complete or not there at all."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    save_file({k: v.detach().cpu().contiguous().clone() for k, v in model.state_dict().items()}, part)
    part.replace(path)


def read_state(path: Path) -> dict[str, Tensor]:
    """The tensors of a checkpoint by key, out of whatever wrapper they came in."""
    if path.suffix not in SUFFIXES:
        raise QexpError(f"{path}: cannot read files ending in {path.suffix!r}; allowed: {', '.join(SUFFIXES)}, .npz")
    damaged = f"{path}: damaged or truncated ({path.stat().st_size:,} bytes); fetch or write it again"
    try:
        if path.suffix == ".safetensors":
            return _unwrap(load_file(path), path)
        return _unwrap(torch.load(path, map_location="cpu", weights_only=True), path)
    except pickle.UnpicklingError as error:
        if not _is_pickle(path):
            raise QexpError(damaged) from error
        raise QexpError(
            f"{path}: refused, for it holds Python objects besides tensors, and unpickling those runs their code. "
            f"Where you trust it, save its state_dict alone: torch.save(model.state_dict(), ...) or safetensors"
        ) from error
    except (RuntimeError, SafetensorError, EOFError, OSError, ValueError, KeyError) as error:
        raise QexpError(f"{damaged} ({error})") from error


def _is_pickle(path: Path) -> bool:
    """Whether the file is an intact zip or pickle; reads the opcodes and runs none of them."""
    try:
        if zipfile.is_zipfile(path):
            return True
        with path.open("rb") as file:
            return all(pickletools.genops(file))
    except (ValueError, IndexError, EOFError):
        return False


def _unwrap(content: Any, path: Path) -> dict[str, Tensor]:
    if isinstance(content, Mapping):
        inner = next((content[w] for w in WRAPPERS if isinstance(content.get(w), Mapping)), content)
        if "pytorch-lightning_version" in content:  # a training module around `model`: its own state is not ours
            inner = {k: v for k, v in inner.items() if k.startswith("model.")}
        if inner and all(isinstance(v, Tensor) for v in inner.values()):
            return dict(inner)
    keys = ", ".join(map(repr, list(content)[:8])) if isinstance(content, Mapping) else ""
    got = f"the keys {keys}" if keys else type(content).__name__
    raise QexpError(f"{path}: no weights in it; got {got}; a state_dict is read, alone or under {', '.join(WRAPPERS)}")


def fit_keys(
    state: Mapping[str, Tensor], own: Mapping[str, Tensor], key_map: Mapping[str, str | None]
) -> dict[str, Tensor]:
    """`state` under the names of `own`: wrapper prefixes stripped, `key_map` applied, BN counters filled in.

    A quantized run's scales and clips are left out: what is read are the float weights beneath. A prefix is stripped
    where every key has it and no key of `own` does. Old files lack `num_batches_tracked`.
    """
    out = {key.replace("._orig_mod.", "."): value for key, value in state.items() if "_quantizer." not in key}
    stripping = True
    while stripping:
        stripping = False
        for prefix in PREFIXES:
            if all(k.startswith(prefix) for k in out) and not any(k.startswith(prefix) for k in own):
                out, stripping = {k.removeprefix(prefix): v for k, v in out.items()}, True
    for pattern, replacement in key_map.items():
        out = _rename(out, pattern, replacement)
    for key in own:
        counter_of = key.removesuffix("num_batches_tracked")
        if counter_of != key and key not in out and f"{counter_of}running_mean" in out:
            out[key] = own[key]
    return out


def _rename(state: Mapping[str, Tensor], pattern: str, replacement: str | None) -> dict[str, Tensor]:
    out: dict[str, Tensor] = {}
    try:
        find = re.compile(pattern)
        for key, value in state.items():
            if replacement is None and find.search(key):
                continue
            new = key if replacement is None else find.sub(replacement, key)
            if new in out:
                raise QexpError(f"key_map: {pattern!r} -> {replacement!r} gives two keys the name {new!r}")
            out[new] = value
    except re.error as error:
        raise QexpError(f"key_map: {pattern!r} -> {replacement!r} is no regular expression ({error})") from error
    return out


def _check(model: nn.Module, state: Mapping[str, Tensor], source: str) -> None:
    own = model.state_dict()
    missing, unexpected = [k for k in own if k not in state], [k for k in state if k not in own]
    shapes = [
        f"{k}: file {list(state[k].shape)}, model {list(own[k].shape)}"
        for k in own
        if k in state and state[k].shape != own[k].shape
    ]
    if not (missing or unexpected or shapes):
        return
    renamed = [] if 2 * len(missing) > len(own) else unexpected  # another network's names say nothing about this one's
    faults = [
        f"{len(missing)} missing: {_list(k + near(k, renamed, 1) for k in missing)}" if missing else "",
        f"{len(unexpected)} unexpected: {_list(unexpected)}" if unexpected else "",
        f"{len(shapes)} of another shape: {_list(shapes)}" if shapes else "",
    ]
    raise QexpError(
        f"{source} does not fit {type(model).__name__}. {'; '.join(filter(None, faults))}. "
        f"Check model= and its arguments (num_classes, shortcut, ...); where only names differ, give model.key_map"
    )


def _list(names: Collection[str]) -> str:
    names = list(names)
    return ", ".join(names[:SHOWN]) + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")


def sha256(path: Path) -> str:
    """The sha256 of a file's bytes, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _from_run(folder: Path) -> Path:
    for name in ("last", "best"):
        for suffix in (".ckpt", ".safetensors", ".pt"):
            path = folder / "checkpoints" / f"{name}{suffix}"
            if path.is_file():
                return path
    found = sorted(p.name for p in (folder / "checkpoints").glob("*"))
    raise QexpError(
        f"{folder}: a folder is read as a finished run, but checkpoints/ has no last.ckpt or best.ckpt in it "
        f"(found: {_list(found) if found else 'nothing'}); name the file itself"
    )


def _from_url(source: str, cache: Path) -> Path:
    url, _, fragment = source.partition("#")
    digest = re.fullmatch(r"sha256=([0-9a-f]{64})", fragment.lower())
    if not digest:
        raise QexpError(f"{source}: a download needs its checksum; append #sha256=<64 hex digits> (sha256sum FILE)")
    # the digest in the name keeps files of one name apart
    path = cache / f"{digest[1][:12]}-{url.rsplit('/', 1)[-1].partition('?')[0]}"
    return _fetch(url, path, digest[1])


def _from_torchvision(source: str, model: nn.Module, cache: Path) -> Path:
    from torchvision import models

    name = getattr(model, "torchvision_name", None)
    if "." not in source and name is None:
        raise QexpError(
            f"weights={source}: a bare torchvision name needs a torchvision model, got {type(model).__name__}; use a "
            f"file, a run folder, a URL, or a full name such as ResNet18_Weights.{source}"
        )
    try:
        weights = models.get_weight(source) if "." in source else models.get_model_weights(name)[source]
    except (KeyError, ValueError, AttributeError) as error:
        known = f"; {name} has {', '.join(w.name for w in models.get_model_weights(name))}" if name else ""
        raise QexpError(f"weights={source}: torchvision knows no such weights{known}") from error
    file = weights.url.rsplit("/", 1)[-1]
    digest = re.search(r"-([0-9a-f]{8,})\.", file)
    return _fetch(weights.url, cache / file, digest[1] if digest else "")


def _fetch(url: str, path: Path, digest: str) -> Path:
    """`path`, downloaded if it is not there, if its sha256 begins with `digest`."""
    if not path.is_file():
        part = path.with_name(f"{path.name}.{os.getpid()}.part")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with urllib.request.urlopen(url, timeout=30) as response, part.open("wb") as file:
                total = int(response.headers.get("Content-Length") or 0)
                with tqdm(total=total or None, unit="B", unit_scale=True, desc=path.name, leave=False) as bar:
                    while block := response.read(1 << 20):
                        file.write(block)
                        bar.update(len(block))
            _compare(part, digest, f"{url} (download)")
            part.replace(path)
        except (OSError, http.client.HTTPException) as error:
            raise QexpError(
                f"{path.name} is not in {path.parent}, and {url} cannot be fetched ({error}). Without network, bring "
                f"the file and put it there as {path}"
            ) from error
        finally:
            part.unlink(missing_ok=True)
    _compare(path, digest, str(path))
    return path


def _compare(path: Path, digest: str, where: str) -> None:
    if not (got := sha256(path)).startswith(digest):
        raise QexpError(f"{where}: sha256 is {got}, expected {digest}; the file is damaged or another one: delete it")


def _not_found(source: str) -> QexpError:
    folder = Path(source).parent
    known = sorted(p.name for p in folder.iterdir()) if folder.is_dir() else []
    where = "" if known else f"; the folder {folder} is empty or not there"
    return QexpError(
        f"weights={source}: no such file{near(Path(source).name, known)}{where}. Allowed: a file, a run folder, a "
        f"torchvision weight name such as IMAGENET1K_V1, or https://...#sha256=<hex>"
    )
