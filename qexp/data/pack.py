"""A pack: images of one size as raw uint8 in one memory-mapped file, with labels and checksums; it is complete or does not exist.

Layout: 4,096 bytes of header (magic, version, length, JSON), the pixels `[N, C, H, W]`, a footer in JSON (labels, chunks
with their sha256, what was skipped and why). While it is being written there are `NAME.part`, the pixels so far, and
`NAME.journal`, one line for each chunk whose pixels are complete: an interrupted packing goes on after the last of them.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import struct
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from qexp.errors import QexpError

MAGIC, VERSION = b"QEXPPACK", 1
HEADER = 4096
_FIXED = struct.Struct("<8sII")  # magic, version, bytes of JSON


@dataclass(frozen=True)
class Chunk:
    """Images that were decoded together: number kept, sha256 of the pixels, labels, and skipped files."""

    kept: int
    sha256: str
    labels: list[int]
    skipped: list[tuple[str, str]] = field(default_factory=list)  # (name, why)
    converted: dict[str, int] = field(default_factory=dict)  # how many were not in RGB, by mode


class Pack:
    """The images of a finished pack file; the first read of a chunk in a process compares its checksum.

    Supports the tensor interface that loaders need: `len`, `shape`, `dtype`, `ndim`, and indexing by a slice or by positions,
    which copies those images out of the mapping. The pixels stay on disk and in the system's page cache, which frees
    them when memory is short.

    Args:
        path: The file.

    Raises:
        QexpError: The file is not a pack, has another version, is cut short or damaged.
    """

    dtype = torch.uint8
    ndim = 4

    def __init__(self, path: Path) -> None:
        self.path = path
        header, footer = _read_ends(path)
        self.chunks = [Chunk(**chunk) for chunk in footer["chunks"]]
        self.about: dict[str, Any] = footer["about"]
        self.shape = torch.Size((header["images"], *header["shape"]))
        self.labels = torch.tensor([label for chunk in self.chunks for label in chunk.labels], dtype=torch.int64)
        self.starts = np.cumsum([0, *(chunk.kept for chunk in self.chunks)])
        self._verified = np.zeros(len(self.chunks), dtype=bool)
        self._pixels = np.memmap(path, np.uint8, "r", HEADER, tuple(self.shape)) if len(self) else None

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, chosen: slice | Tensor | list[int]) -> Tensor:
        """The images `[n, C, H, W]` of a slice or of positions, copied into a new tensor."""
        at = np.arange(len(self))[chosen if isinstance(chosen, slice) else np.asarray(chosen, dtype=np.int64)]
        if not len(at):
            return torch.empty((0, *self.shape[1:]), dtype=torch.uint8)
        for number in np.unique(np.searchsorted(self.starts, at, side="right") - 1):
            self._verify(int(number))
        return torch.from_numpy(self._pixels[at])

    def _verify(self, number: int) -> None:
        if self._verified[number]:
            return
        low, high = self.starts[number : number + 2]
        if hashlib.sha256(self._pixels[low:high]).hexdigest() != self.chunks[number].sha256:
            raise QexpError(
                f"{self.path}: images {low}..{high - 1} have changed since they were packed (checksum); delete the file, "
                "and it is packed again from the images"
            )
        self._verified[number] = True

    @property
    def skipped(self) -> list[tuple[str, str]]:
        """The images that could not be decoded, with the reasons."""
        return [tuple(s) for chunk in self.chunks for s in chunk.skipped]

    @property
    def converted(self) -> dict[str, int]:
        """How many images were not stored as RGB, by mode."""
        out: dict[str, int] = {}
        for chunk in self.chunks:
            for mode, n in chunk.converted.items():
                out[mode] = out.get(mode, 0) + n
        return out

    @property
    def content(self) -> str:
        """The sha256 of the chunks' checksums, labels and shape: identifies the content, independent of the name."""
        text = json.dumps([list(self.shape), [[c.kept, c.sha256, c.labels] for c in self.chunks]])
        return hashlib.sha256(text.encode()).hexdigest()


def _read_ends(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    again = "delete it, and it is packed again from the images"
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(HEADER)
        if len(start) < HEADER or not start.startswith(MAGIC):
            raise QexpError(f"{path}: no pack file, or cut short ({size:,} bytes); {again}")
        _, version, length = _FIXED.unpack_from(start)
        if version != VERSION:
            raise QexpError(f"{path}: a pack of version {version}, this qexp reads version {VERSION}; {again}")
        try:
            header = json.loads(start[_FIXED.size : _FIXED.size + length])
            whole = HEADER + header["pixels"] + header["footer"]
            if size != whole:
                raise QexpError(f"{path}: {size:,} bytes, {whole:,} were written: cut short or added to; {again}")
            file.seek(HEADER + header["pixels"])
            text = file.read(header["footer"])
            if hashlib.sha256(text).hexdigest() != header["sha256"]:
                raise ValueError("the footer's checksum differs")
            return header, json.loads(text)
        except (ValueError, KeyError, TypeError) as error:
            raise QexpError(f"{path}: damaged ({error}); {again}") from error


class PackWriter:
    """Writes a pack chunk by chunk; an interrupted writer is continued after its last complete chunk.

    Args:
        path: The file that exists once everything is written.
        shape: `(C, H, W)` of an image.

    Attributes:
        chunks: Chunks written so far.
    """

    def __init__(self, path: Path, shape: tuple[int, int, int]) -> None:
        self.path, self.shape = path, shape
        self.part, self.journal = path.with_name(path.name + ".part"), path.with_name(path.name + ".journal")
        path.parent.mkdir(parents=True, exist_ok=True)
        self.chunks = list(self._complete())
        # Nothing left to fail on close.
        self._file = self.part.open("r+b" if self.part.exists() else "w+b", buffering=0)
        self._file.truncate(HEADER + sum(c.kept for c in self.chunks) * self.image_bytes)
        self._file.seek(0, os.SEEK_END)
        self._write_journal()

    @property
    def image_bytes(self) -> int:
        return int(np.prod(self.shape))

    def _complete(self) -> Iterator[Chunk]:
        """The chunks of the journal whose pixels are all in the part file, by their checksums."""
        if not (self.journal.exists() and self.part.exists()):
            return
        with self.part.open("rb") as pixels:
            pixels.seek(HEADER)
            for line in self.journal.read_text().splitlines():
                try:
                    chunk = Chunk(**json.loads(line))
                except (ValueError, TypeError):
                    return  # the line that was being written
                if hashlib.sha256(pixels.read(chunk.kept * self.image_bytes)).hexdigest() != chunk.sha256:
                    return
                yield chunk

    def _write_journal(self) -> None:
        with _room_on_disk(self):
            self.journal.write_text("".join(json.dumps(asdict(c)) + "\n" for c in self.chunks))

    def add(
        self, pixels: np.ndarray, labels: list[int], skipped: list[tuple[str, str]], converted: dict[str, int]
    ) -> None:
        """Appends a chunk: pixels uint8 `[n, C, H, W]`, their labels, and what was skipped among them."""
        if pixels.dtype != np.uint8 or pixels.shape != (len(labels), *self.shape):
            raise ValueError(f"{pixels.dtype} {pixels.shape}, {len(labels)} labels; uint8 [n, {self.shape}] is needed")
        pixels = np.ascontiguousarray(pixels)
        chunk = Chunk(len(labels), hashlib.sha256(pixels).hexdigest(), labels, skipped, converted)
        with _room_on_disk(self):
            self._write(pixels.reshape(-1).data)
            with self.journal.open("a") as journal:
                journal.write(json.dumps(asdict(chunk)) + "\n")
        self.chunks.append(chunk)

    def _write(self, content: memoryview) -> None:
        while len(content):  # a nearly full disk writes a part and fails at the next call
            content = content[self._file.write(content) :]

    def finish(self, about: dict[str, Any]) -> None:
        """Writes footer and header and gives the file its name; `about` is kept with it."""
        footer = json.dumps({"about": about, "chunks": [asdict(c) for c in self.chunks]}).encode()
        images = sum(c.kept for c in self.chunks)
        header = {
            "images": images,
            "shape": self.shape,
            "pixels": images * self.image_bytes,
            "footer": len(footer),
            "sha256": hashlib.sha256(footer).hexdigest(),
        }
        text = json.dumps(header).encode()
        with _room_on_disk(self):
            self._write(memoryview(footer))
            self._file.seek(0)
            self._write(memoryview((_FIXED.pack(MAGIC, VERSION, len(text)) + text).ljust(HEADER, b"\0")))
            os.fsync(self._file.fileno())
        self.close()
        self.part.replace(self.path)
        self.journal.unlink()

    def close(self) -> None:
        """Closes the part file; it stays for the next writer."""
        self._file.close()


class _room_on_disk:
    """Context manager: a full disk raises a `QexpError` that names the kept file and what to do."""

    def __init__(self, writer: PackWriter) -> None:
        self.writer = writer

    def __enter__(self) -> None: ...

    def __exit__(self, kind: type | None, error: BaseException | None, _: object) -> None:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            writer = self.writer
            kept = sum(c.kept for c in writer.chunks)
            raise QexpError(
                f"{writer.part}: the disk is full; {kept} packed images are kept there. Make room (or name another folder, "
                "dataset.data.pack_dir) and run again: packing goes on where it stopped"
            ) from error
