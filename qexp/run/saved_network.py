"""Saves the quantized network of a run beside its record, and loads it back bit for bit.

`state.safetensors` holds the tensors that the run changed: scales, zero points and learned state of quantizers; weights where the run
trained or edited them. Tensors that equal those of the float network (with its batch norms folded, where the run folds them) are stored
as a hash and come from the weights that the run started from.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from qexp.errors import QexpError
from qexp.layers.calls import calls
from qexp.layers.quantized import float_class
from qexp.models.packed_state import unpacked
from qexp.models.weights import load_weights
from qexp.network.facts import facts
from qexp.passes.fold_bn import fold_bn
from qexp.passes.permanent import make_permanent
from qexp.recipe.plan import Entry, Plan, Source, apply
from qexp.results import zoo
from qexp.run import training
from qexp.run.settings import Settings
from qexp.system.objects import make

log = logging.getLogger(__name__)
FILE = "state.safetensors"
VERSION = "1"  # version of the file's layout


@dataclass
class Origin:
    """The origin of a network: its classes, weights and hashes before the run changed it.

    Attributes:
        classes: Class of each module as built, by name.
        weights: The source of the float weights: a file or a torchvision name; None where they are random.
        hashes: Hash of each tensor of the float network, with batch norms folded where the run folds them.
    """

    classes: dict[str, type[nn.Module]]
    weights: str | None = None
    hashes: dict[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, model: nn.Module, weights: str | Path | None) -> Origin:
        """Returns the origin of a network that has just been built."""
        kinds = {name: float_class(m) for name, m in model.named_modules()}
        return cls(kinds, None if weights is None else str(weights))

    def folded(self, model: nn.Module) -> None:
        """Records the hashes of the float network's tensors, as they are now."""
        self.hashes = {name: digest(tensor) for name, tensor in model.state_dict().items()}


def digest(tensor: Tensor) -> str:
    """Returns a hash of a tensor's type, shape and bytes."""
    tensor = tensor.detach().cpu().contiguous()
    head = f"{tensor.dtype}{tuple(tensor.shape)}".encode()
    content = tensor.reshape(-1).view(torch.uint8).numpy().data if tensor.numel() else b""
    return hashlib.blake2b(head + bytes(content), digest_size=12).hexdigest()


def serialized(model: nn.Module, plan: Plan, origin: Origin, example: Tensor) -> bytes:
    """Returns the content of `state.safetensors`.

    Args:
        model: The quantized network as it was evaluated.
        plan: The quantizers of its tensors.
        origin: The classes, weights and hashes of the network before the run changed it.
        example: One input, `[1, C, H, W]`; its shape is saved.
    """
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    kept = {name: h for name, h in origin.hashes.items() if name in state and digest(state[name]) == h}
    if origin.weights is None:
        kept = {}
    stored, aliases = without_aliases({name: t for name, t in state.items() if name not in kept})
    standing = {f"{name}.{n}" if name else n: c.form for name, m in model.named_modules() for n, c in calls(m).items()}
    replaced = {
        name: f"{float_class(m).__module__}.{float_class(m).__qualname__}"
        for name, m in model.named_modules()
        if origin.classes.get(name, standing.get(name, float_class(m))) is not float_class(m)
    }
    about = {
        "version": VERSION,
        "weights": origin.weights,
        "kept": kept,
        "aliases": aliases,
        "replaced": replaced,
        "example": list(example.shape),
        "plan": rows_of(plan),
    }
    return save(stored, metadata={"qexp": json.dumps(about)})


def load(folder: str | Path) -> nn.Module:
    """Returns the quantized network of a finished run, or of an entry of the zoo, in evaluation mode, as it was evaluated.

    Args:
        folder: The folder of the run, `<runs_dir>/<study>/<point>`, or `zoo:NAME`.

    Raises:
        QexpError: The folder holds no finished run, its state is missing or damaged, or the first weights are missing or changed.
    """
    if zoo.name_of(folder) is not None:
        return of_entry(zoo.read(str(folder)))
    folder = Path(folder)
    about, tensors = saved(folder)
    return restored(config_of(folder), about, tensors, folder / FILE)


def of_entry(entry: zoo.Entry) -> nn.Module:
    """Returns the quantized network of an entry of the zoo."""
    about, arrays = entry.network()
    return restored(entry.config(), about, with_aliases(unpacked(about, arrays), about), entry.folder / zoo.NETWORK)


def restored(
    config: Mapping[str, Any], about: Mapping[str, Any], tensors: Mapping[str, Tensor], where: Path
) -> nn.Module:
    """Returns a quantized network in evaluation mode.

    Args:
        config: The configuration of its run.
        about: What `serialized` wrote of it.
        tensors: Its saved tensors.
        where: The file they come from, for errors.
    """
    settings = Settings.of(config)
    model = make(settings.network.net, where="model.net").eval()
    example = torch.zeros(about["example"])
    training.task(settings, model).take_network(example)
    if about["kept"]:
        load_weights(model, about["weights"], settings.network.key_map, settings.shared / "weights")
    make_permanent(model, example)
    facts(model, example)  # its function calls have stand-ins from here on, which the run may have replaced
    if about["kept"]:
        _fold(model, settings, about, example)
    _put_replaced(model, about["replaced"], tensors)
    apply(model, plan_of(about), facts(model, example))
    _fill(model, tensors, about, where)
    return model.eval()


def saved(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Returns the description of the network in `state.safetensors`, and its tensors."""
    path = folder / FILE
    if not path.is_file():
        raise QexpError(
            f"{path} is missing; run the point again (force=true) to write it, or name the folder of a finished run"
        )
    try:
        with safe_open(path, "pt") as file:
            about = json.loads((file.metadata() or {})["qexp"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
        if about["version"] != VERSION:
            raise QexpError(f"{path} has version {about['version']}; this qexp reads version {VERSION}")
        tensors = with_aliases(tensors, about)
    except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
        raise QexpError(f"{path} is damaged ({error}); run the point again with force=true") from None
    return about, tensors


def rows_of(plan: Plan) -> list[list[Any]]:
    """Returns a plan in the form of the file."""
    return [[e.layer, e.site, e.spec, e.bits, e.source.value, e.by] for e in plan]


def plan_of(about: Mapping[str, Any]) -> Plan:
    """Returns the plan of a saved network."""
    return Plan(tuple(Entry(*row[:4], Source(row[4]), row[5]) for row in about["plan"]))


def with_aliases(tensors: Mapping[str, Tensor], about: Mapping[str, Any]) -> dict[str, Tensor]:
    """Returns saved tensors under all their names."""
    return {**tensors, **{name: tensors[first] for name, first in about["aliases"].items()}}


def config_of(folder: Path) -> Mapping[str, Any]:
    """Returns the configuration of a run."""
    try:
        config = yaml.safe_load((folder / "config.yaml").read_text())
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise QexpError(f"{folder / 'config.yaml'} cannot be read ({error})") from None
    if not isinstance(config, Mapping):
        raise QexpError(f"{folder / 'config.yaml'} is not a mapping; name the folder of a finished run")
    return config


def _fold(model: nn.Module, settings: Settings, about: Mapping[str, Any], example: Tensor) -> None:
    """Folds batch norms as the run folded them, in place, and compares the tensors with those the run started from."""
    found = facts(model, example)
    if settings.bn == "fold" and found.bn_of:
        fold_bn(model, found)
    state = model.state_dict()
    changed = [name for name, value in about["kept"].items() if name not in state or digest(state[name]) != value]
    if changed:
        raise QexpError(
            f"weights={about['weights']} differ from the run's first weights in {len(changed)} tensors, such as {changed[0]}"
        )


def _put_replaced(model: nn.Module, replaced: Mapping[str, str], tensors: Mapping[str, Tensor]) -> None:
    """Replaces, in place, the modules that the run replaced; their saved buffers are constructor arguments."""
    for name, target in replaced.items():
        prefix = f"{name}."
        own = {key.removeprefix(prefix): t for key, t in tensors.items() if key.startswith(prefix)}
        parent, _, leaf = name.rpartition(".")
        module = make({"_target_": target, **{key: t.clone() for key, t in own.items() if "." not in key}})
        setattr(model.get_submodule(parent), leaf, module)


def _fill(model: nn.Module, tensors: Mapping[str, Tensor], about: Mapping[str, Any], where: Path) -> None:
    """Loads the saved tensors, in place; a bias that the run added becomes a parameter."""
    for name, tensor in tensors.items():
        parent, _, leaf = name.rpartition(".")
        owner = model.get_submodule(parent)
        if leaf in owner._parameters and owner._parameters[leaf] is None:
            setattr(owner, leaf, nn.Parameter(torch.empty_like(tensor)))
    own = model.state_dict()
    whole = {**{name: own[name] for name in about["kept"]}, **tensors}
    try:
        model.load_state_dict(whole, strict=True)
    except RuntimeError as error:
        raise QexpError(f"{where} does not fit the network: {str(error).splitlines()[-1].strip()}") from None


def without_aliases(state: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Returns each tensor once, and the other names of tensors that share memory (tied layers, shared quantizers)."""
    first: dict[tuple[int, tuple[int, ...]], str] = {}
    stored, aliases = {}, {}
    for name, tensor in state.items():
        key = (tensor.data_ptr(), tuple(tensor.shape))
        if tensor.numel() and key in first:
            aliases[name] = first[key]
        else:
            first[key] = name
            stored[name] = tensor
    return stored, aliases
