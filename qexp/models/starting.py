"""Starts a network from the weights of the same network with another number of classes."""

from __future__ import annotations

import logging
from pathlib import Path

from torch import nn

from qexp.errors import QexpError
from qexp.models.matching import listed
from qexp.models.weights import load_weights

log = logging.getLogger(__name__)

IMAGENET = 1000  # classes of published weights


def start_from(model: nn.Module, twin: nn.Module, source: str | Path) -> None:
    """Loads weights into a network, but for its classifier, which keeps its random weights, in place.

    Args:
        model: The network.
        twin: The same network with the number of classes that the weights were trained for; it receives the weights.
        source: As for `weights`: a file, a name of published weights, a run, an address.

    Raises:
        QexpError: The source does not fit the twin, or more than the number of classes differs between the two networks.
    """
    try:
        load_weights(twin, source)
    except QexpError as error:
        raise QexpError(f"model.net.start: {error}") from None
    found, own = twin.state_dict(), model.state_dict()
    other = [key for key in own if key not in found or own[key].shape[1:] != found[key].shape[1:]]
    if other:
        raise QexpError(
            f"model.net.start={source} does not fit: {listed(other)} differ in more than the number of classes"
        )
    new = [key for key in own if own[key].shape != found[key].shape]
    model.load_state_dict({key: value for key, value in found.items() if key not in new}, strict=False)
    log.info(
        "model.net.start: %s; random are %s", source, listed(new) if new else "no weights: weights=... does the same"
    )
