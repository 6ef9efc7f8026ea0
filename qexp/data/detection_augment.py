"""Random crops, colours and mirroring of annotated pictures, as SSD trains on them."""

from __future__ import annotations

from functools import cache

import torch
from PIL import Image
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import v2


@cache
def _transforms() -> v2.Compose:
    return v2.Compose(
        [
            v2.RandomPhotometricDistort(p=0.5),
            v2.RandomZoomOut(fill={tv_tensors.Image: (123, 117, 104)}, side_range=(1.0, 2.0), p=0.3),
            v2.RandomIoUCrop(),
            v2.RandomHorizontalFlip(p=0.5),
            v2.SanitizeBoundingBoxes(min_size=2.0, labels_getter=lambda inputs: inputs[2]),
        ]
    )


def augmented(image: Image.Image, boxes: Tensor, seed: int) -> tuple[Image.Image, Tensor, Tensor]:
    """A changed image, its boxes `[k, 4]` in shares of its new size, and their objects `[k]`.

    Colours change for every second picture; a third are shrunk onto a larger mean-coloured canvas; a crop overlaps some object by a
    random least share; every second one is mirrored. Objects whose centre is outside the crop are dropped. A picture that would
    lose all its objects is not changed.

    Args:
        image: RGB image.
        boxes: Corners in shares of the image `[n, 4]`.
        seed: Seed of all random choices.

    Source: Liu et al. 2016, arXiv:1512.02325, section 2.2 (data augmentation).
    Differs from the paper: the canvas is at most twice as wide, not four times.
    """
    width, height = image.size
    scale = torch.tensor([width, height, width, height], dtype=torch.float32)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        picture = tv_tensors.Image(v2.functional.pil_to_tensor(image))
        corners = tv_tensors.BoundingBoxes(boxes * scale, format="XYXY", canvas_size=(height, width))
        picture, corners, which = _transforms()(picture, corners, torch.arange(len(boxes)))
    if not len(which) and len(boxes):
        return image, boxes, torch.arange(len(boxes))
    down, across = picture.shape[-2:]
    shares = corners.as_subclass(Tensor) / torch.tensor([across, down, across, down])
    return v2.functional.to_pil_image(picture), shares, which
