"""Faces that any network can distinguish: people of one colour each, and pairs of them in three folds."""

from pathlib import Path

import numpy as np
from PIL import Image

PEOPLE = 12


def write_people(root: Path) -> Path:
    """Writes 12 people with 4 images each below `root/images` and 24 pairs in `root/pairs.csv`; returns `root`.

    Images 3 and 4 of each person are in no pair.
    """
    rng, lines = np.random.default_rng(0), []
    for i in range(PEOPLE):
        color = rng.integers(30, 220, 3)
        for n in range(1, 5):
            image = np.clip(color + rng.normal(0, 12, (40, 36, 3)), 0, 255).astype(np.uint8)
            path = root / "images" / f"P{i}" / f"P{i}_{n:04d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(path)
    for i in range(PEOPLE):
        other = (i + 1) % PEOPLE
        lines.append(f"{i % 3},P{i}/P{i}_0001.png,P{i}/P{i}_0002.png,1")
        lines.append(f"{i % 3},P{i}/P{i}_0001.png,P{other}/P{other}_0002.png,0")
    (root / "pairs.csv").write_text("\n".join(lines))
    return root
