"""The float network a run starts from: it is built, loaded (or trained and kept) and scored once."""

from __future__ import annotations

import hashlib
import json
import logging
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from qexp.calibration.cache import behaviour, code_of, tensor_hash
from qexp.callbacks.observers import others
from qexp.data.contract import DataSet
from qexp.errors import QexpError
from qexp.models.weights import load_weights, save_weights, sha256
from qexp.results import identity, zoo
from qexp.run import training
from qexp.run.devices import processes
from qexp.run.naming import PLACES_DATA, trainer_content
from qexp.run.settings import Network, Settings
from qexp.run.settings.checks import Spec
from qexp.system.locks import locked
from qexp.system.objects import make
from qexp.tasks.base import Score

log = logging.getLogger(__name__)
RANDOM = "random"  # as `weights`: fresh ones, which nothing trains


def build(settings: Settings, data: DataSet) -> nn.Module:
    """Returns the network with fresh, seeded weights and the outputs that the data set's task reads."""
    training.seed(settings.seed)
    model = make(settings.network.net, where="model.net")
    for name, weight in model.named_parameters():
        if not weight.numel() and not isinstance(weight, nn.parameter.UninitializedParameter):
            raise QexpError(
                f"model.net: {name} has no elements ({list(weight.shape)}); give the network a width of at least 1"
            )
    training.task(settings, model).take_network(data.example())
    return model


def contents(settings: Settings) -> dict[str, str]:
    """Returns the content hashes of the files that the settings name, by their keys, and of the code they name, as `code`.

    Weights (or a run's last checkpoint) and the plan are always included; files of the network, and weights and files of a teacher,
    where there are any.
    """
    return {
        "weights": _content(settings.weights),
        "plan": _content(settings.widths.plan),
        **_structure(settings.network),
        **_teacher(settings.schedule.distill.teacher),
        "code": identity.digest(code(settings)),
    }


def code(settings: Settings) -> dict[str, str]:
    """Returns a hash of the code of every class that the settings name, by module; callbacks that only observe are left out."""
    return identity.code(identity.named({**settings.resolved, "callbacks": others(settings.callbacks)}))


def about(settings: Settings) -> dict[str, Any]:
    """Returns the origin of a point: its weights, and the code it depends on (see `results/identity.py`)."""
    return {
        "weights": {"source": settings.weights, "sha256": _content(settings.weights)},
        "code": code(settings),
    }


def _structure(network: Network) -> dict[str, str]:
    own = {"cfg": _content(network.definition)} if network.definition else {}
    return own | _files("model.net", network.net, besides=network.definition)


def _teacher(teacher: Network | None) -> dict[str, str]:
    if teacher is None:
        return {}
    key, weights = "schedule.distill.teacher", teacher.weights
    found = {} if _content(weights) == str(weights) else {f"{key}.weights": _content(weights)}
    return found | _files(f"{key}.net", teacher.net)


def _files(key: str, net: Spec, besides: str | None = None) -> dict[str, str]:
    """Returns the hash of each existing file that an argument of a network names (`backbone`), by the argument's key."""
    named = {name: value for name, value in net.items() if isinstance(value, str) and value != besides}
    return {f"{key}.{name}": _content(value) for name, value in named.items() if _at_hand(value)}


def _at_hand(name: str) -> bool:
    try:
        return Path(name).is_file()
    except OSError:  # a text too long for a name
        return False


def _content(source: str | Path | None) -> str:
    """Returns a file's hash, or the name itself where there is no such file (a torchvision name, a URL with its own hash)."""
    path = Path(str(source))
    if (name := zoo.name_of(source)) is not None:
        return zoo.content(str(source)) if name in zoo.names() else str(source)
    try:
        if path.is_dir():
            path = path / "checkpoints" / "last.ckpt"
        return sha256(path) if source is not None and path.is_file() else str(source)
    except OSError:  # a name too long for a file, or an unreadable file: opening it later raises the error
        return str(source)


def float_model(settings: Settings, data: DataSet) -> nn.Module:
    """Returns the float network with the weights that are named, or trains it by the schedule's `pretrain` and keeps it."""
    model = build(settings, data)
    if settings.weights == RANDOM:
        log.warning("weights=random: nothing has trained this network; its scores are those of chance")
        return model
    if settings.weights is not None:
        record = load_weights(model, settings.weights, settings.network.key_map, settings.shared / "weights")
        log.info("weights: %s (sha256 %s)", record.source, record.sha256[:12])
        return model
    folder = settings.shared / "float" / _float_hash(settings, data)
    done = folder / "weights.safetensors"
    if done.exists():
        load_weights(model, done)
        log.info("weights: the float network trained earlier (%s)", done)
        return model
    log.info("weights: none given, so the float network is trained first and kept in %s", folder)
    with locked(folder):  # points that run side by side train it once
        if done.exists():
            load_weights(model, done)
            return model
        schedule = settings.float_schedule
        training.fit(training.task(settings, model, schedule), data, _asked_for(settings), schedule, "float", folder)
        save_weights(model, done)
    return model


def source(settings: Settings, data: DataSet) -> Path | str | None:
    """Returns the source of the float weights: what `weights` names, the file that keeps the trained float network, or None (random)."""
    if settings.weights == RANDOM:
        return None
    if settings.weights is not None:
        return settings.weights
    return (settings.shared / "float" / _float_hash(settings, data) / "weights.safetensors").resolve()


def is_untrained(settings: Settings, data: DataSet) -> bool:
    """Returns whether `float_model` has to train the network first."""
    return settings.weights is None and not Path(source(settings, data)).exists()


def _asked_for(settings: Settings) -> Settings:
    """Returns the settings that train the float network; if it serves another run, only callbacks that observe stay."""
    if settings.schedule.is_float:
        return settings
    left_out = others(settings.callbacks)
    return replace(settings, callbacks={k: v for k, v in settings.callbacks.items() if k not in left_out})


def _float_hash(settings: Settings, data: DataSet) -> str:
    images = dict(settings.data.module)
    trainer = trainer_content(settings.trainer.options, trained=True)
    for key in (*PLACES_DATA, "download", "max_samples", "sampling", "eval_batch_size"):
        images.pop(key, None)
    trainer.pop("limit_test_batches", None)
    content: list[Any] = [settings.network.net, settings.float_schedule.options, settings.data.task]
    if callbacks := others(_asked_for(settings).callbacks):
        content.append({"callbacks": callbacks})
    content.append(identity.code(identity.named([content, images, trainer])))
    if files := _structure(settings.network):
        content.append(files)
    text = json.dumps([content, images, trainer, settings.seed, data.fingerprint()], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def reference(settings: Settings, model: nn.Module, data: DataSet, folder: Path) -> Score:
    """Returns the float network's score from the same evaluation as the quantized one; cached by weights, code and images."""
    path = settings.shared / "scores" / f"{_score_hash(settings, model, data)}.npz"
    if path.exists():
        try:
            return Score.load(path)
        except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile) as error:
            log.warning("the kept float score in %s is damaged (%s); evaluating again", path, error)
    found, _ = training.evaluate(model, data, settings, "float", folder)
    found.save(path)
    return found


def _score_hash(settings: Settings, model: nn.Module, data: DataSet) -> str:
    images, task, callbacks = settings.data.module, settings.data.task, others(settings.callbacks)
    how = [_scored(settings, data), settings.trainer.precision, task, callbacks]
    # not the state_dict, which lacks buffers that are not saved but change the outputs
    tensors = dict([*model.named_parameters(), *model.named_buffers()])
    network = [tensor_hash(tensors), [(name, *behaviour(m)) for name, m in model.named_modules()]]
    sources = [code_of(model), identity.code(identity.named([images, task, callbacks]))]
    text = json.dumps([network, sources, how], default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _scored(settings: Settings, data: DataSet) -> list[Any]:
    """Returns what identifies the scored images: their positions, in order; without positions, all settings of the data set."""
    loader, limit, world = (
        data.test_dataloader(),
        settings.trainer.options.get("limit_test_batches"),
        processes(settings.trainer),
    )
    indices, size = getattr(loader, "indices", None), getattr(loader, "batch_size", None)
    if indices is None or size is None:
        asked = {key: value for key, value in settings.data.module.items() if key not in PLACES_DATA}
        return [data.fingerprint(), asked, settings.max_samples, limit, world]
    batches = len(loader) if limit is None else int(limit * len(loader)) if isinstance(limit, float) else limit
    if batches >= len(loader):
        return [data.fingerprint(), tensor_hash([indices])]
    # the limit counts batches per process, of the images in its share
    taken = [indices[rank::world][: batches * size] for rank in range(world)]
    return [data.fingerprint(), tensor_hash([torch.cat(taken).sort().values])]
