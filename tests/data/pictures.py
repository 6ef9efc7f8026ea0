"""Tiny image files in folders, of every kind a camera or a disk may leave."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
from PIL import Image


def picture(seed: int, size: tuple[int, int] = (40, 30), mode: str = "RGB", kind: str = "PNG", **save) -> bytes:
    """An encoded image of `size` (width, height) with smooth random content."""
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 256, (6, 8, 3), dtype=np.uint8))
    image = small.resize(size, Image.Resampling.BICUBIC)
    if mode == "I;16":
        image = Image.fromarray((np.asarray(image.convert("L")).astype(np.uint16)) * 257)
    elif mode != "RGB":
        image = image.convert(mode)
    out = io.BytesIO()
    image.save(out, kind, **save)
    return out.getvalue()


def folders(root: Path, classes: dict[str, int], **how) -> Path:
    """`root/<class>/<i>.png` for each class and its number of images; returns `root`."""
    for c, (name, n) in enumerate(classes.items()):
        (root / name).mkdir(parents=True, exist_ok=True)
        for i in range(n):
            (root / name / f"{i}.png").write_bytes(picture(1000 * c + i, **how))
    return root
