"""Handles a last training batch of one image, which a batch norm on vectors cannot normalise."""

from __future__ import annotations

import logging
from typing import Any

import torch
from pytorch_lightning import LightningDataModule
from torch import Tensor, nn

from qexp.errors import QexpError
from qexp.system import ranks
from qexp.system.within import evaluating, hooked

log = logging.getLogger(__name__)


def spare_single_image(model: nn.Module, data: LightningDataModule) -> None:
    """Drops a last training batch of one image from each epoch if the network cannot be trained on it; logs it.

    A batch norm that gets one value per channel from one image (vectors, maps of one pixel) has no variance to divide by.

    Raises:
        QexpError: Every training batch is one image.
    """
    if getattr(data, "drop_last", True):
        return
    loader = data.train_dataloader()
    size = loader.batch_size
    images = len(loader.indices if hasattr(loader, "indices") else loader.dataset)
    mine = -(-images // ranks.world())
    if size > 1 and mine % size != 1:
        return
    norm = norm_of_vectors(model, data.example())
    if norm is None:
        return
    if size == 1 or mine == 1:
        raise QexpError(
            f"dataset.data.batch_size={size} is not allowed here: {norm} normalises vectors over the batch, which needs at least "
            f"2 images, and each batch would be one ({images} training images)"
        )
    log.info(
        "the last training batch would be one image of %d, which %s cannot normalise: it is left out of each epoch (another one each "
        "time the order changes)",
        images,
        norm,
    )
    data.drop_last = True  # it drops only that one image


@torch.no_grad()
def norm_of_vectors(model: nn.Module, example: Tensor) -> str | None:
    """Returns the name of the first batch norm that gets one value per channel of one image `[1, C, H, W]`, None if none does."""
    found: list[str] = []

    def see(name: str) -> Any:
        def hook(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            if args and args[0].numel() == args[0].shape[1]:
                found.append(name)

        return hook

    norms = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    home = next((t.device for t in model.parameters()), torch.device("cpu"))
    if norms:
        with evaluating(model), hooked(m.register_forward_pre_hook(see(name)) for name, m in norms):
            model(example.to(home))
    return found[0] if found else None
