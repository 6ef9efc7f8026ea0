"""torchvision's networks, built without a download and with every add and concatenation exposed as a module."""

from typing import Any

from torch import nn

from qexp.errors import QexpError, near
from qexp.models.starting import IMAGENET, start_from


def torchvision_model(name: str, num_classes: int = IMAGENET, start: str | None = None, **options: Any) -> nn.Module:
    """The torchvision classifier `name`, randomly initialised; weights are loaded by `qexp.models.weights`.

    Args:
        name: As in `torchvision.models.list_models()`; kept as `torchvision_name`, by which weight names are found.
        num_classes: Outputs of the classifier.
        start: Weights for 1,000 classes from which training starts, as `weights` names them; the classifier stays random.
        options: Arguments of torchvision's constructor (`aux_logits`, `init_weights`, `dropout`, ...).
    """
    from torchvision import models  # seconds to import

    from qexp.models.expose import expose_adds

    known = models.list_models(module=models)
    if name not in known:
        raise QexpError(f"torchvision has no classifier {name!r}{near(name, known)}; it has {', '.join(known)}")
    if name in ("googlenet", "inception_v3"):  # torchvision warns where nothing is chosen
        options.setdefault("init_weights", True)
    try:
        model = models.get_model(name, weights=None, num_classes=num_classes, **options)
    except TypeError as error:
        raise QexpError(
            f"model.net of torchvision's {name}: {error}; its arguments are those of its constructor"
        ) from error
    expose_adds(model)
    model.torchvision_name = name
    if start is not None:
        start_from(model, torchvision_model(name, IMAGENET, **options), start)
    return model
