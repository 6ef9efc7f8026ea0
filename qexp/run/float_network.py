"""The float network a run starts from: it is built, loaded (or trained and kept) and scored once."""

from __future__ import annotations

import hashlib
import json
import logging
import zipfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from pytorch_lightning import Callback
from torch import nn

from qexp.calibration.cache import behaviour, code_of, tensor_hash
from qexp.callbacks.observers import others
from qexp.data.contract import DataSet
from qexp.errors import QexpError
from qexp.models.weight_places import RANDOM
from qexp.models.weights import load_weights, save_weights
from qexp.results import identity
from qexp.run import training
from qexp.run.contents import structure
from qexp.run.devices import processes
from qexp.run.naming import PLACES_DATA, trainer_content
from qexp.run.settings import Settings
from qexp.system.locks import locked
from qexp.system.objects import make
from qexp.tasks.base import Score

log = logging.getLogger(__name__)


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


def float_model(settings: Settings, data: DataSet, observers: Sequence[Callback] = ()) -> nn.Module:
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
        module = training.task(settings, model, schedule)
        training.fit(module, data, _asked_for(settings), schedule, "float", folder, observers=observers)
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
    if files := structure(settings.network):
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
