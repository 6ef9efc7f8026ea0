"""A network's tensors with its weights at their own bits; and the float weights of an entry of the zoo."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from qexp.errors import QexpError
from qexp.models.norms import identity_norm, norm_after
from qexp.numerics.packed_values import Packed, packed
from qexp.results import zoo

QUANTIZER = "_quantizer"  # in the names of tensors that belong to a layer's quantizers


def arrays_of(
    state: Mapping[str, Tensor], steps: Mapping[str, Tensor | None]
) -> tuple[dict[str, NDArray], dict[str, Any]]:
    """Returns the arrays that hold a state, and the description of those tensors that became codes.

    Args:
        state: Tensors by name.
        steps: Names of tensors that lie on few levels, each with the step they are multiples of, where it is known.
    """
    arrays: dict[str, NDArray] = {}
    about: dict[str, Any] = {}
    for name, tensor in state.items():
        step = steps.get(name)
        found = None
        if name in steps and tensor.dtype is torch.float32:
            found = packed(tensor.numpy(), None if step is None else step.float().numpy())
        if found is None:
            arrays[name] = tensor.numpy()
        else:
            held, about[name] = found.arrays(name)
            arrays |= held
    return arrays, about


def unpacked(about: Mapping[str, Any], arrays: Mapping[str, NDArray]) -> dict[str, Tensor]:
    """Returns the state that arrays hold."""
    plain = {name: torch.from_numpy(np.array(array)) for name, array in arrays.items() if "#" not in name}
    return plain | {
        name: torch.from_numpy(Packed.of(name, arrays, form).values()) for name, form in about["packed"].items()
    }


def float_state(source: str, model: nn.Module) -> dict[str, Tensor]:
    """Returns the float state of `model` with the weights of an entry of the zoo, each the value of its code.

    A batch norm that the entry's run folded becomes the identity plus the folded bias.

    Raises:
        QexpError: There is no such entry, or it belongs to another network.
    """
    entry = zoo.read(source)
    about, arrays = entry.network()
    held = {name: t for name, t in unpacked(about, arrays).items() if QUANTIZER not in name}
    held |= {name: held[first] for name, first in about["aliases"].items() if first in held}
    state, norms = dict(model.state_dict()), norm_after(model)
    for layer, (norm, eps) in norms.items():
        if norm in about["replaced"] and f"{layer}.bias" in held:
            held |= {f"{norm}.{part}": t for part, t in identity_norm(held.pop(f"{layer}.bias"), eps).items()}
    differ = [n for n in (*held, *state) if n not in state or n not in held or held[n].shape != state[n].shape]
    differ = [name for name in differ if not name.endswith("num_batches_tracked")]
    if differ:
        raise QexpError(
            f"weights={source} does not fit {type(model).__name__} ({differ[0]}): it is {entry.card['model']} on "
            f"{entry.card['dataset']}, of the command {entry.card['command']}"
        )
    return {name: held.get(name, value) for name, value in state.items()}
