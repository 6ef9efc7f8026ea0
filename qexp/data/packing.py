"""Packs a listing of image files: decodes each once, with several processes, in bounded memory, resumable."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import time
from dataclasses import asdict
from pathlib import Path

import numpy as np
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from qexp.data.decode import BadImage, Resize, rgb
from qexp.data.listing import Listing
from qexp.data.pack import VERSION, Pack, PackWriter
from qexp.errors import QexpError
from qexp.system.locks import locked

log = logging.getLogger(__name__)
CHUNK = 32  # images decoded, checksummed and journalled together
AHEAD = 2  # chunks that a process may be ahead of the writer; with CHUNK, this bounds the memory
_FEW = 500  # number of images that are decoded faster than processes start
_NAMED = 8  # number of skipped files named in a warning


class Chunks(Dataset):
    """Decoded chunks of a listing: `(pixels uint8 [n, 3, crop, crop], labels, skipped, converted)`."""

    def __init__(self, listing: Listing, resize: Resize) -> None:
        self.listing, self.resize = listing, resize

    def __len__(self) -> int:
        return -(-len(self.listing) // CHUNK)

    def __getitem__(self, number: int):
        pixels, labels, skipped, converted = [], [], [], {}
        for i in range(number * CHUNK, min((number + 1) * CHUNK, len(self.listing))):
            name = self.listing.names[i]
            try:
                image, mode = rgb(self.listing.source.read(name))
                pixels.append(self.resize(image))
            except BadImage as error:
                skipped.append((name, str(error)))
                continue
            labels.append(self.listing.labels[i])
            if mode != "RGB":
                converted[mode] = converted.get(mode, 0) + 1
        shape = (3, self.resize.crop, self.resize.crop)
        return np.stack(pixels) if pixels else np.empty((0, *shape), np.uint8), labels, skipped, converted


def pack_name(listing: Listing, resize: Resize) -> str:
    """The file name of a pack; it depends on the files, their labels and the resizing."""
    digest = hashlib.sha256(json.dumps([VERSION, asdict(resize)], sort_keys=True).encode())
    for name, label in zip(listing.names, listing.labels):
        digest.update(json.dumps([name, label, *listing.source.stamp(name)]).encode())
    return f"{resize.crop}px-{len(listing)}-{digest.hexdigest()[:12]}.pack"


def packed(
    listing: Listing,
    resize: Resize,
    folder: Path,
    what: str,
    workers: int | None = None,
    bad_images: str = "skip",
) -> Pack:
    """Opens the pack of a listing in `folder`; makes it first if it does not exist.

    Args:
        listing: The images.
        resize: Resizing and crop of the images.
        folder: Folder of the packs.
        what: Name of the data set and split, for file name, progress bar and messages.
        workers: Processes that decode; as many as there are processors (8 at most) by default, none for a few images.
        bad_images: `skip` counts and reports an image that cannot be decoded; `error` stops at it.

    Raises:
        QexpError: The disk is full, no image can be decoded, or (with `error`) one image cannot be decoded.
    """
    if bad_images not in ("skip", "error"):
        raise QexpError(f"bad_images={bad_images!r} is not allowed; use skip or error")
    path = folder / f"{what}-{pack_name(listing, resize)}"
    if not path.exists():
        try:
            folder.mkdir(parents=True, exist_ok=True)
            # Runs of a sweep in parallel pack only once.
            with locked(folder, lambda: log.info("%s: another process is packing in %s", what, folder)):
                if not path.exists():
                    _make(path, listing, resize, what, workers, bad_images)
        except OSError as error:
            raise QexpError(
                f"{folder}: cannot be made or written ({error}); name another folder, dataset.data.pack_dir=..."
            ) from error
    pack = Pack(path)
    report(pack, what, bad_images)
    return pack


def report(pack: Pack, what: str, bad_images: str) -> None:
    """Logs skipped images; raises if no image is left, or if none may be skipped."""
    if not pack.skipped:
        return
    named = "; ".join(f"{name}: {why}" for name, why in pack.skipped[:_NAMED])
    text = f"{what}: {len(pack.skipped)} of {len(pack) + len(pack.skipped)} images cannot be decoded ({named})"
    if bad_images == "error" or not len(pack):
        raise QexpError(f"{text}; replace them, or leave them out with dataset.data.bad_images=skip")
    log.warning("%s; they are left out, n_eval and n_skipped in the results count them", text)


def _make(path: Path, listing: Listing, resize: Resize, what: str, workers: int | None, bad_images: str) -> None:
    chunks = Chunks(listing, resize)
    writer = PackWriter(path, (3, resize.crop, resize.crop))
    done = min(len(writer.chunks) * CHUNK, len(listing))
    need, free = (len(listing) - done) * writer.image_bytes, shutil.disk_usage(path.parent).free
    if need > free:
        writer.close()
        raise QexpError(
            f"{path.parent}: packing {what} needs {need / 1e9:.1f} GB, {free / 1e9:.1f} GB are free; make room, or name "
            "another folder, dataset.data.pack_dir"
        )
    if workers is None:
        workers = min(len(os.sched_getaffinity(0)), 8) if len(listing) - done > _FEW else 0
    loader = DataLoader(
        chunks,
        batch_size=None,
        sampler=range(len(writer.chunks), len(chunks)),
        num_workers=workers,
        prefetch_factor=AHEAD if workers else None,
        collate_fn=_as_is,  # arrays travel by pipe: shared memory is small in containers
    )
    start = time.perf_counter()
    try:
        with tqdm(total=len(listing), initial=done, desc=f"packing {what}", unit=" images") as bar:
            for pixels, labels, skipped, converted in loader:
                if skipped and bad_images == "error":
                    raise QexpError(f"{listing.source.path}/{skipped[0][0]} cannot be decoded: {skipped[0][1]}")
                writer.add(pixels, labels, skipped, converted)
                bar.update(len(labels) + len(skipped))
        rate = (len(listing) - done) / max(time.perf_counter() - start, 1e-9)
        about = {"what": what, "resize": asdict(resize), "source": listing.source.path.name}
        writer.finish(about | ({"images_per_second": rate} if len(listing) > done else {}))
    finally:
        writer.close()
    log.info("%s: %d images packed at %.0f/s in %s", what, len(listing), rate, path)


def _as_is(chunk):
    return chunk
