"""Reads weight files safely: only tensors and plain values are unpickled, so a foreign file can do no harm.

The bytes of the file decide its form, not its name. The unpacked size that a file claims is checked before anything is unpacked.
"""

from __future__ import annotations

import argparse
import pickle
import pickletools
import tarfile
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file

from qexp.errors import QexpError

SUFFIXES = (".safetensors", ".pt", ".pth", ".th", ".ckpt", ".tar", ".bin", ".pkl")
SCRIPT = (
    "is a TorchScript program, not a file of weights; save its weights in Python: "
    "torch.save(torch.jit.load(FILE, map_location='cpu').state_dict(), 'weights.pt')"
)
EXPORTED = (
    "is a program written by torch.export, not a file of weights; save its weights in Python: "
    "torch.save(torch.export.load(FILE).state_dict, 'weights.pt')"
)
MAGIC = {  # endings of files that are often mistaken for weights of PyTorch
    b"\x1f\x8b": "is compressed with gzip; unpack it first",
    b"BZh": "is compressed with bzip2; unpack it first",
    b"\xfd7zXZ": "is compressed with xz; unpack it first",
    b"\x28\xb5\x2f\xfd": "is compressed with zstd; unpack it first",
    b"\x89HDF\r\n": "is an HDF5 file, which holds weights of Keras; save the weights with PyTorch",
    b"\x93NUMPY": "is a single NumPy array; a state_dict has one tensor per name",
    b"version https://git-lfs": "is only a pointer to the file (Git LFS); fetch the file itself: git lfs pull",
}
_KINDS = ("f2", "f4", "f8", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "?")


def read(path: Path, room: int) -> Any:
    """Returns the content of a checkpoint: tensors and plain values in mappings and lists.

    Args:
        path: The file.
        room: Bytes that its tensors may take in memory, if that is more than twice the size of the file.

    Raises:
        QexpError: The file is not a checkpoint, is damaged, unpacks to more than `room`, or holds objects of foreign classes.
    """
    try:
        return _reader(path, room)(path)
    except QexpError:
        raise
    except pickle.UnpicklingError as error:
        if not _is_pickle(path):
            raise _damaged(path) from error
        raise QexpError(
            f"{path}: refused, for it holds Python objects besides tensors, and unpickling those runs their code. "
            f"Where you trust it, save its state_dict alone: torch.save(model.state_dict(), ...) or safetensors"
        ) from error
    except Exception as error:  # the bytes come from anywhere: the readers may raise anything for a wrong byte
        raise _damaged(path, error) from error


def _reader(path: Path, room: int) -> Callable[[Path], Any]:
    """Returns the function that reads a file of this form."""
    with path.open("rb") as file:
        head = file.read(32)
    if path.suffix == ".safetensors" or _is_safetensors(head, path):
        return load_file
    if head.startswith(b"PK") and zipfile.is_zipfile(path):
        _check_archive(path, room)
        return _load
    if what := next((text for magic, text in MAGIC.items() if head.startswith(magic)), None):
        raise QexpError(f"{path}: {what}")
    if head[:1] == b"\x80":  # a pickle, as PyTorch wrote it before version 1.6
        return _load
    if _is_tar(path):
        raise QexpError(f"{path}: is a tar archive; unpack it and name the file of weights in it")
    if path.suffix not in SUFFIXES:
        raise QexpError(f"{path}: cannot read files ending in {path.suffix!r}; allowed: {', '.join(SUFFIXES)}, .npz")
    raise _damaged(path)


def _load(path: Path) -> Any:
    with torch.serialization.safe_globals(_plain()), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of kinds of tensors that are refused afterwards
        return torch.load(path, map_location="cpu", weights_only=True)


def _plain() -> list[Any]:
    """Returns the classes of values that trainers keep beside their tensors and that are data alone: options, NumPy's numbers."""
    scalar = np.float64(0).__reduce__()[0]
    numbers = [type(np.dtype(kind)) for kind in _KINDS]
    names = ("numpy.core.multiarray.scalar", "numpy._core.multiarray.scalar")
    return [argparse.Namespace, np.dtype, *numbers, *((scalar, name) for name in names)]


def _check_archive(path: Path, room: int) -> None:
    """Checks the form and the unpacked size that a zip claims."""
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
    names = [entry.filename for entry in entries]
    if any(name.endswith("constants.pkl") for name in names) or any("/code/" in name for name in names):
        raise QexpError(f"{path}: {SCRIPT}")
    if any(name.endswith(("serialized_exported_program.json", "archive_format")) for name in names):
        raise QexpError(f"{path}: {EXPORTED}")
    if names and all(name.endswith(".npy") for name in names):
        raise QexpError(
            f"{path}: is an .npz of NumPy arrays by another name; 8-bit codes are read from a file named .npz"
        )
    if not any(name.endswith("data.pkl") for name in names):
        raise QexpError(f"{path}: is a zip archive without weights of PyTorch in it (no data.pkl); unpack it")
    check_size(path, sum(entry.file_size for entry in entries), room)


def check_size(path: Path, claimed: int, room: int) -> None:
    """Checks the size that a file claims to unpack to, before anything is unpacked.

    Raises:
        QexpError: The size is more than twice the file's and more than `room`.
    """
    if claimed > max(2 * path.stat().st_size, room):
        raise QexpError(
            f"{path}: claims to unpack to {claimed:,} bytes; {room:,} are allowed for this network: another network's file, or damaged"
        )


def _damaged(path: Path, error: Exception | None = None) -> QexpError:
    why = f" ({type(error).__name__}: {str(error).splitlines()[0][:200] if str(error) else 'no text'})" if error else ""
    return QexpError(f"{path}: damaged or truncated ({path.stat().st_size:,} bytes); fetch or write it again{why}")


def _is_safetensors(head: bytes, path: Path) -> bool:
    return len(head) > 8 and head[8:9] == b"{" and int.from_bytes(head[:8], "little") < path.stat().st_size


def _is_tar(path: Path) -> bool:
    try:
        return path.stat().st_size > 0 and tarfile.is_tarfile(path)
    except (OSError, tarfile.TarError, ValueError):
        return False


def _is_pickle(path: Path) -> bool:
    """Whether the file is an intact zip or pickle; reads the opcodes and runs none of them."""
    try:
        if zipfile.is_zipfile(path):
            return True
        with path.open("rb") as file:
            return all(pickletools.genops(file))
    except Exception:  # a pickle of wrong bytes: lengths beyond memory, indices beyond the stack
        return False
