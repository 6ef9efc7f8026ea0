"""The float network a run starts from: built, given its weights (or trained and kept), and scored once."""

from __future__ import annotations

import hashlib
import json
import logging
import zipfile
from pathlib import Path

from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from pytorch_lightning import LightningDataModule
from torch import nn

from qexp import training
from qexp.calibration.cache import behaviour, tensor_hash
from qexp.locks import locked
from qexp.record import PLACES_DATA, trainer_content
from qexp.tasks.base import Score
from qexp.weights import load_weights, save_weights, sha256

log = logging.getLogger(__name__)


def cache_dir(cfg: DictConfig) -> Path:
    """Returns the folder of what runs share: float networks, their scores, calibration statistics."""
    return Path(cfg.runs_dir) / ".cache"


def build(cfg: DictConfig, data: LightningDataModule) -> nn.Module:
    """Returns the network with fresh weights, seeded, whose results are what the data set's task reads."""
    training.seed(cfg.seed)
    model = instantiate(cfg.model.net)
    training.task(cfg, model).take_network(data.example())
    return model


def contents(cfg: DictConfig) -> dict[str, str]:
    """Returns the content hashes of the files a configuration names, by their keys.

    Weights (or a run's last checkpoint) and the plan always; a network's own files, a teacher's weights and files where there are any.
    """
    return {"weights": _content(cfg.weights), "plan": _content(cfg.plan), **_structure(cfg), **_teacher(cfg)}


def _structure(cfg: DictConfig) -> dict[str, str]:
    own = {"cfg": _content(cfg.model.cfg)} if cfg.model.get("cfg") else {}
    return own | _files("model.net", cfg.model.net, besides=cfg.model.get("cfg"))


def _teacher(cfg: DictConfig) -> dict[str, str]:
    teacher, key = (cfg.schedule.get("distill") or {}).get("teacher"), "schedule.distill.teacher"
    if not teacher:
        return {}
    weights = teacher.get("weights")
    found = {} if _content(weights) == str(weights) else {f"{key}.weights": _content(weights)}
    return found | _files(f"{key}.net", teacher.net)


def _files(key: str, net: DictConfig, besides: str | None = None) -> dict[str, str]:
    """Returns the hash of each file at hand that an argument of a network names (`backbone`), by the argument's key."""
    arguments = OmegaConf.to_container(net, resolve=True).items()
    named = {name: value for name, value in arguments if isinstance(value, str) and value != besides}
    return {f"{key}.{name}": _content(value) for name, value in named.items() if _at_hand(value)}


def _at_hand(name: str) -> bool:
    try:
        return Path(name).is_file()
    except OSError:  # a text too long for a name
        return False


def _content(source: str | None) -> str:
    """Returns a file's hash, or the name itself where no file is at hand (a torchvision name, a URL with its own hash)."""
    path = Path(str(source))
    if path.is_dir():
        path = path / "checkpoints" / "last.ckpt"
    return sha256(path) if source is not None and path.is_file() else str(source)


def float_model(cfg: DictConfig, data: LightningDataModule) -> nn.Module:
    """Returns the float network: with the weights named, or trained by the schedule's `pretrain` and kept for the next run."""
    model = build(cfg, data)
    if cfg.weights is not None:
        record = load_weights(model, cfg.weights, dict(cfg.model.get("key_map") or {}), cache_dir(cfg) / "weights")
        log.info("weights: %s (sha256 %s)", record.source, record.sha256[:12])
        return model
    folder = cache_dir(cfg) / "float" / _float_hash(cfg, data)
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
        schedule = float_schedule(cfg)
        training.fit(training.task(cfg, model, schedule), data, cfg, schedule, "float", folder)
        save_weights(model, done)
    return model


def float_schedule(cfg: DictConfig) -> DictConfig:
    """Returns the schedule that trains the float network: the schedule itself where it is one, else its `pretrain`."""
    return cfg.schedule if cfg.schedule.name == "float" else cfg.schedule.pretrain


def _float_hash(cfg: DictConfig, data: LightningDataModule) -> str:
    images = OmegaConf.to_container(cfg.dataset.data, resolve=True)
    trainer = trainer_content(OmegaConf.to_container(cfg.trainer, resolve=True), trained=True)
    for key in (*PLACES_DATA, "download", "max_samples", "sampling", "eval_batch_size"):
        images.pop(key, None)
    trainer.pop("limit_test_batches", None)
    content = [OmegaConf.to_container(n, resolve=True) for n in (cfg.model.net, float_schedule(cfg))]
    if cfg.dataset.get("task"):
        content.append(training.task_options(cfg))
    if files := _structure(cfg):
        content.append(files)
    text = json.dumps([content, images, trainer, cfg.seed, data.fingerprint()], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def reference(cfg: DictConfig, model: nn.Module, data: LightningDataModule, folder: Path) -> Score:
    """Returns the float network's score, from the same evaluation the quantized one goes through; kept by weights and images."""
    how = [
        data.fingerprint(),
        cfg.max_samples,
        cfg.dataset.data.get("sampling"),
        cfg.trainer.get("limit_test_batches"),
        cfg.trainer.get("precision"),
    ]
    # not the state_dict: a buffer that is not saved computes all the same
    tensors = dict([*model.named_parameters(), *model.named_buffers()])
    network = [tensor_hash(tensors), [(name, *behaviour(m)) for name, m in model.named_modules()]]
    content = json.dumps([network, how, training.task_options(cfg)], default=str)
    path = cache_dir(cfg) / "scores" / f"{hashlib.sha256(content.encode()).hexdigest()[:16]}.npz"
    if path.exists():
        try:
            return Score.load(path)
        except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile) as error:
            log.warning("the kept float score in %s is damaged (%s); evaluating again", path, error)
    found, _ = training.evaluate(model, data, cfg, "float", folder)
    found.save(path)
    return found
