"""A network of the user's own, built from its dotted name."""

from __future__ import annotations

import inspect
from typing import Any

from torch import nn

from qexp.errors import QexpError
from qexp.system.objects import find, make

# what constructors call the number of their outputs
CLASSES = (
    "num_classes",
    "n_classes",
    "nb_classes",
    "num_class",
    "classes",
    "num_labels",
    "num_outputs",
    "out_features",
)


def imported(target: str, num_classes: int, **options: Any) -> nn.Module:
    """Returns the network that a class or a function of the user's makes.

    Args:
        target: Dotted name of a class or function: `mypkg.nets.Net`.
        num_classes: Classes of the data set; passed on under the name that the constructor has for it (`num_classes`, `n_classes`, ...),
            unless `options` sets it, or the constructor has none.
        options: Further arguments of the constructor.

    Raises:
        QexpError: The name cannot be imported, its constructor refuses an argument, or it makes something else than a module.
    """
    spec = {"_target_": target, **options}
    name, is_sure = _classes_argument(find(spec, "model.target"))
    if name is None or name in options:
        model = make(spec, where="model.net")
    else:
        try:
            model = make({**spec, name: num_classes}, where="model.net")
        except QexpError as error:
            if is_sure or not isinstance(error.__cause__, TypeError):
                raise
            model = make(spec, where="model.net")
    if not isinstance(model, nn.Module):
        raise QexpError(f"model.target={target} makes a {type(model).__name__}; a torch.nn.Module is needed")
    return model


def _classes_argument(target: Any) -> tuple[str | None, bool]:
    """Returns the constructor's name for the number of classes, and whether it is sure to have it: `**options` may take any name."""
    try:
        parameters = inspect.signature(target).parameters
    except (TypeError, ValueError):  # a builtin without a signature
        return None, True
    named = next((name for name in CLASSES if name in parameters), None)
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    return (named, True) if named or not takes_any else ("num_classes", False)
