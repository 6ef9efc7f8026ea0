"""The float network a run starts from: built, given its weights (or trained and kept), and scored once."""

from __future__ import annotations

import hashlib
import json
import logging
import zipfile
from pathlib import Path

from torch import nn

from qexp.calibration.cache import behaviour, tensor_hash
from qexp.data.contract import DataSet
from qexp.models.weights import load_weights, save_weights, sha256
from qexp.run import training
from qexp.run.naming import PLACES_DATA, trainer_content
from qexp.run.settings import Network, Settings
from qexp.run.settings.checks import Spec
from qexp.system.locks import locked
from qexp.system.objects import make
from qexp.tasks.base import Score

log = logging.getLogger(__name__)


def build(settings: Settings) -> nn.Module:
    """Returns the network with fresh weights, seeded."""
    training.seed(settings.seed)
    return make(settings.network.net, where="model.net")


def contents(settings: Settings) -> dict[str, str]:
    """Returns the content hashes of the files a configuration names, by their keys.

    Weights (or a run's last checkpoint) and the plan always; a network's own files, a teacher's weights and files where there are any.
    """
    return {
        "weights": _content(settings.weights),
        "plan": _content(settings.widths.plan),
        **_structure(settings.network),
        **_teacher(settings.schedule.distill.teacher),
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
    """Returns the hash of each file at hand that an argument of a network names (`backbone`), by the argument's key."""
    named = {name: value for name, value in net.items() if isinstance(value, str) and value != besides}
    return {f"{key}.{name}": _content(value) for name, value in named.items() if _at_hand(value)}


def _at_hand(name: str) -> bool:
    try:
        return Path(name).is_file()
    except OSError:  # a text too long for a name
        return False


def _content(source: str | Path | None) -> str:
    """Returns a file's hash, or the name itself where no file is at hand (a torchvision name, a URL with its own hash)."""
    path = Path(str(source))
    if path.is_dir():
        path = path / "checkpoints" / "last.ckpt"
    return sha256(path) if source is not None and path.is_file() else str(source)


def float_model(settings: Settings, data: DataSet) -> nn.Module:
    """Returns the float network: with the weights named, or trained by the schedule's `pretrain` and kept for the next run."""
    model = build(settings)
    if settings.weights is not None:
        record = load_weights(model, settings.weights, dict(settings.network.key_map), settings.shared / "weights")
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
        training.fit(training.task(settings, model, schedule), data, settings, schedule, "float", folder)
        save_weights(model, done)
    return model


def source(settings: Settings, data: DataSet) -> Path | str:
    """Returns where the float weights come from: what `weights` names, or the file in which the trained float network is kept."""
    if settings.weights is not None:
        return settings.weights
    return (settings.shared / "float" / _float_hash(settings, data) / "weights.safetensors").resolve()


def _float_hash(settings: Settings, data: DataSet) -> str:
    images = dict(settings.data.module)
    trainer = trainer_content(settings.trainer.options, trained=True)
    for key in (*PLACES_DATA, "download", "max_samples", "sampling", "eval_batch_size"):
        images.pop(key, None)
    trainer.pop("limit_test_batches", None)
    content = [settings.network.net, settings.float_schedule.options, settings.data.task]
    if files := _structure(settings.network):
        content.append(files)
    text = json.dumps([content, images, trainer, settings.seed, data.fingerprint()], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def reference(settings: Settings, model: nn.Module, data: DataSet, folder: Path) -> Score:
    """Returns the float network's score, from the same evaluation the quantized one goes through; kept by weights and images."""
    how = [
        data.fingerprint(),
        settings.max_samples,
        settings.data.module.get("sampling"),
        settings.trainer.options.get("limit_test_batches"),
        settings.trainer.precision,
    ]
    # not the state_dict: a buffer that is not saved computes all the same
    tensors = dict([*model.named_parameters(), *model.named_buffers()])
    network = [tensor_hash(tensors), [(name, *behaviour(m)) for name, m in model.named_modules()]]
    content = json.dumps([network, how, settings.data.task], default=str)
    path = settings.shared / "scores" / f"{hashlib.sha256(content.encode()).hexdigest()[:16]}.npz"
    if path.exists():
        try:
            return Score.load(path)
        except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile) as error:
            log.warning("the kept float score in %s is damaged (%s); evaluating again", path, error)
    found, _ = training.evaluate(model, data, settings, "float", folder)
    found.save(path)
    return found
