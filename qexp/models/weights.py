"""Loads float weights strictly from a file, a torchvision name, a URL, a finished run or the zoo.

Only tensors are unpickled (`weights_only=True`, or safetensors), and every key must fit.
"""

import http.client
import json
import logging
import os
import re
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn
from tqdm import tqdm

from qexp.errors import QexpError
from qexp.models.checkpoints import read
from qexp.models.int8_npz import read_int8
from qexp.models.key_maps import EXAMPLE, parsed
from qexp.models.matching import listed, match
from qexp.models.packed_state import float_state
from qexp.models.timm_weights import timm_address
from qexp.models.weight_places import check_there, is_address
from qexp.results import zoo
from qexp.system.file_hash import sha256
from qexp.system.whole_files import whole

log = logging.getLogger(__name__)

# A file may unpack to this many bytes plus the network and its copies (an optimizer's, averages).
ROOM, COPIES = 64 << 20, 8


@dataclass(frozen=True)
class WeightsRecord:
    """The origin of a model's weights: the source as given, the sha256 of the file, and its kind."""

    source: str
    sha256: str
    kind: str  # file | torchvision | timm | url | run | zoo


def load_weights(
    model: nn.Module,
    source: str | Path,
    key_map: Mapping[str, str | None] | str | None = None,
    cache_dir: str | Path | None = None,
) -> WeightsRecord:
    """Loads `source` into `model` strictly and returns what was loaded.

    Args:
        model: The float network; its own keys decide which prefixes are stripped, its `weight_readers` read formats of its own.
        source: A file (safetensors, or what `torch.save` wrote, under any name; `.npz` of 8-bit codes); a run folder, whose last
            checkpoint is taken; a torchvision weight name (`ResNet18_Weights.IMAGENET1K_V1`, or
            `IMAGENET1K_V1` for a torchvision model); `DEFAULT` for a torchvision or timm model; `https://...#sha256=<hex>`; or
            `zoo:NAME`, whose weights lie on their grid.
        key_map: Regular expression -> replacement for the file's keys, applied in order; `None` drops the key. A text is read as
            YAML, as the command line has it: `{"^net[.]": "", "total_ops$": null}`.
        cache_dir: Where downloads are kept; `$QEXP_DATA_DIR/weights` by default, or `data/weights` without it.

    Raises:
        QexpError: The source is missing, damaged, not allowed, or does not fit.
    """
    source = str(source)
    if zoo.name_of(source) is not None:
        model.load_state_dict(float_state(source, model), strict=True)
        return WeightsRecord(source, zoo.content(source), "zoo")
    check_there(source)
    cache = Path(cache_dir) if cache_dir else Path(os.environ.get("QEXP_DATA_DIR", "data")) / "weights"
    if is_address(source):
        path, kind = _from_url(source, cache), "url"
    elif Path(source).is_dir():
        path, kind = _from_run(Path(source)), "run"
    elif Path(source).is_file():
        path, kind = Path(source), "file"
    elif Path(source).exists():
        raise QexpError(f"weights={source}: not a regular file (a pipe or a device); save the weights as a file")
    else:
        path, kind = _published(source, model, cache)
    if not os.access(path, os.R_OK):
        raise QexpError(f"weights={source}: the file may not be read; change its permissions")
    own = getattr(model, "weight_readers", {})  # by file ending: readers of the network's own formats
    room = ROOM + COPIES * sum(t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers()))
    if path.suffix in own:
        found = own[path.suffix](path)
    else:
        found = read_int8(path, model, room) if path.suffix == ".npz" else read(path, room)
    state = match(found, model, _as_mapping(key_map), source)
    try:
        model.load_state_dict(state, strict=True)
    except (RuntimeError, ValueError) as error:  # of a module that has rules of its own
        raise QexpError(f"{source} does not fit {type(model).__name__} ({error})") from error
    return WeightsRecord(source, sha256(path), kind)


def save_weights(model: nn.Module, path: str | Path) -> None:
    """Writes the model's `state_dict` as safetensors; the file is complete or does not exist."""
    path = Path(path)
    try:
        with whole(path) as part:
            save_file({k: v.detach().cpu().contiguous().clone() for k, v in model.state_dict().items()}, part)
    except (OSError, SafetensorError) as error:
        raise QexpError(
            f"{path}: the weights cannot be written ({error}); make room, or choose another folder"
        ) from error


def _as_mapping(key_map: Mapping[str, str | None] | str | None) -> Mapping[str, str | None]:
    """Returns a key map as a mapping; accepts a mapping or text."""
    said = parsed(key_map) if isinstance(key_map, str) else key_map or {}
    if not isinstance(said, Mapping):
        raise QexpError(f"key_map={key_map} is not allowed; use a mapping: {EXAMPLE}")
    return said


def _from_run(folder: Path) -> Path:
    """Returns the last checkpoint of a run; of a run that left none (float only, or calibrated), the float weights it used."""
    for name in ("last", "best"):
        for suffix in (".ckpt", ".safetensors", ".pt"):
            path = folder / "checkpoints" / f"{name}{suffix}"
            if path.is_file():
                return path
    used = _used_by(folder)
    if used and Path(used).is_file():
        log.info("weights: %s has no checkpoints; taking the float weights that it used, %s", folder, used)
        return Path(used)
    if used:
        raise QexpError(f"{folder}: it has no checkpoints; name the float weights that it used: weights={used}")
    found = sorted(p.name for p in (folder / "checkpoints").glob("*"))
    raise QexpError(
        f"{folder}: a folder is read as a finished run, but checkpoints/ has no last.ckpt or best.ckpt in it "
        f"(found: {listed(found) if found else 'nothing'}); name the file itself"
    )


def _used_by(folder: Path) -> str | None:
    """Returns the float weights that a run's saved state names; None where it has no readable state."""
    try:
        with safe_open(folder / "state.safetensors", "pt") as state:
            return json.loads((state.metadata() or {})["qexp"])["weights"]
    except (OSError, SafetensorError, KeyError, TypeError, ValueError):
        return None


def _from_url(source: str, cache: Path) -> Path:
    url, _, fragment = source.partition("#")
    digest = re.fullmatch(r"sha256=([0-9a-f]{64})", fragment.lower())
    if not digest:
        raise QexpError(f"{source}: a download needs its checksum; append #sha256=<64 hex digits> (sha256sum FILE)")
    # the digest in the name keeps files of one name apart
    path = cache / f"{digest[1][:12]}-{url.rsplit('/', 1)[-1].partition('?')[0]}"
    return _fetch(url, path, digest[1])


def _published(source: str, model: nn.Module, cache: Path) -> tuple[Path, str]:
    """Returns the file of weights that timm or torchvision publishes, and which of them does."""
    name = getattr(model, "timm_name", None)
    if name is None or "." in source:
        return _from_torchvision(source, model, cache), "torchvision"
    if source != "DEFAULT":
        raise QexpError(
            f"weights={source} is not allowed for timm's {name}; use weights=DEFAULT (the tag after the dot of model.name chooses "
            "among timm's weights), a file, or null"
        )
    url, file = timm_address(name)
    return _fetch(url, cache / file, ""), "timm"


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
        try:
            with whole(path) as part:
                _download(url, part, path.name)
                _compare(part, digest, f"{url} (download)")
        except (OSError, http.client.HTTPException) as error:
            raise QexpError(
                f"{path.name} is not in {path.parent}, and {url} cannot be fetched ({error}). Without network, bring "
                f"the file and put it there as {path}"
            ) from error
    _compare(path, digest, str(path))
    return path


def _download(url: str, part: Path, name: str) -> None:
    """Downloads a URL to `part`, with a progress bar named `name`."""
    with urllib.request.urlopen(url, timeout=30) as response, part.open("wb") as file:
        total = int(response.headers.get("Content-Length") or 0)
        with tqdm(total=total or None, unit="B", unit_scale=True, desc=name, leave=False) as bar:
            while block := response.read(1 << 20):
                file.write(block)
                bar.update(len(block))


def _compare(path: Path, digest: str, where: str) -> None:
    if not (got := sha256(path)).startswith(digest):
        raise QexpError(f"{where}: sha256 is {got}, expected {digest}; the file is damaged or another one: delete it")
