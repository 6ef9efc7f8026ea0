"""Decodes image files from a folder or a zip archive to uint8 pixels, resized and cropped as the weights need."""

from __future__ import annotations

import io
import os
import re
import struct
import warnings
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from qexp.errors import QexpError

MODES = (
    "RGB",
    "L",
    "1",
    "P",
    "LA",
    "PA",
    "RGBA",
    "RGBX",
    "CMYK",
    "YCbCr",
)  # 8 bits per channel: the conversion to RGB is exact
INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "lanczos")


class BadImage(Exception):
    """An image cannot be decoded; the message gives the reason."""


@dataclass(frozen=True)
class Resize:
    """torchvision's preprocessing before normalisation: resize with Pillow, centre crop.

    Pillow averages when it shrinks. OpenCV's bilinear resize, with which CAQ was measured, does not: images of 500 x 375 come out
    up to 35 grey levels apart (1.15 in the mean), those that need no resize are equal.

    Attributes:
        resize: Length of the shorter side, or `(height, width)` to squash to.
        crop: Side of the square cut from the middle.
        interpolation: `nearest`, `bilinear`, `bicubic` or `lanczos`, antialiased as Pillow does it.
    """

    resize: int | tuple[int, int]
    crop: int
    interpolation: str = "bilinear"

    def __post_init__(self) -> None:
        if self.interpolation not in INTERPOLATIONS:
            raise QexpError(f"interpolation={self.interpolation!r} is not allowed; use {', '.join(INTERPOLATIONS)}")
        if min(self.resize if isinstance(self.resize, tuple) else (self.resize,)) < 1 or self.crop < 1:
            raise QexpError(f"resize={self.resize}, crop={self.crop} is not allowed; use 1 pixel or more")

    def __call__(self, image) -> np.ndarray:
        """The pixels uint8 [3, crop, crop] of a Pillow image in RGB."""
        from torchvision.transforms import InterpolationMode  # seconds to import
        from torchvision.transforms import functional as F

        size = [self.resize] if isinstance(self.resize, int) else list(self.resize)
        image = F.center_crop(F.resize(image, size, InterpolationMode(self.interpolation)), [self.crop])
        return np.ascontiguousarray(np.asarray(image).transpose(2, 0, 1))


def of_weights(name: str | None, network: str | None) -> tuple[int, str] | None:
    """The `(resize, interpolation)` of torchvision's weights `name`; None for what is no torchvision weight name.

    An unknown name is not an error here; loading the weights raises it.
    """
    if not name or not re.fullmatch(r"(\w+_Weights\.)?[A-Z][A-Z0-9_]*", str(name)):
        return None
    if "." not in name and not network:
        return None
    from torchvision import models

    try:
        weights = models.get_weight(name) if "." in name else models.get_model_weights(network)[name]
        preset = weights.transforms()
        return preset.resize_size[0], preset.interpolation.value
    except (KeyError, ValueError, AttributeError):
        return None


def rgb(content: bytes):
    """The Pillow image in RGB of an encoded file, and the mode it was stored in.

    Like torchvision's loader, it repeats grey, looks up palettes, converts CMYK and drops transparency.

    Raises:
        BadImage: The file is truncated, is not an image, or has more than 8 bits per channel.
    """
    from PIL import Image, UnidentifiedImageError

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # warnings about metadata; damaged pixels raise errors
            image = Image.open(io.BytesIO(content))
            mode = image.mode
            if mode not in MODES:
                raise BadImage(f"its mode is {mode}, not 8 bits per channel")
            image.load()
            if mode in ("P", "PA") and "transparency" in image.info:
                image = image.convert("RGBA")
            return image.convert("RGB"), mode
    except UnidentifiedImageError:
        raise BadImage("no image that Pillow knows" if content else "empty file") from None
    except (
        OSError,
        SyntaxError,
        ValueError,
        EOFError,
        IndexError,
        struct.error,
        zlib.error,
        Image.DecompressionBombError,
    ) as error:
        raise BadImage(str(error)) from error


class Source:
    """Reads files by name from a folder or a zip archive.

    Every process opens the archive itself, since a descriptor inherited by a fork shares its file position.

    Args:
        path: The folder or the `.zip`.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._archive: tuple[int, zipfile.ZipFile] | None = None  # with the process that opened it
        if not path.is_dir():
            try:
                self.archive()
            except (OSError, zipfile.BadZipFile) as error:
                raise QexpError(f"{path}: neither a folder nor a readable zip archive ({error})") from error

    def archive(self) -> zipfile.ZipFile:
        if self._archive is None or self._archive[0] != os.getpid():
            self._archive = os.getpid(), zipfile.ZipFile(self.path)
        return self._archive[1]

    def __getstate__(self) -> dict:
        return {"path": self.path, "_archive": None}

    def names(self) -> list[str]:
        """Every file, as a path with `/` below the source, sorted; hidden files are left out."""
        if self.path.is_dir():
            found = (p.relative_to(self.path) for p in self.path.rglob("*") if not p.is_dir())
        else:
            found = (Path(name) for name in self.archive().namelist() if not name.endswith("/"))
        return sorted(p.as_posix() for p in found if not any(part.startswith((".", "__MACOSX")) for part in p.parts))

    def stamp(self, name: str) -> list[int]:
        """Size and modification time of a file, or its checksum in an archive; they identify the file's state."""
        if self.path.is_dir():
            stat = (self.path / name).stat()
            return [stat.st_size, stat.st_mtime_ns]
        info = self.archive().getinfo(name)
        return [info.file_size, info.CRC]

    def read(self, name: str) -> bytes:
        """The bytes of a file.

        Raises:
            BadImage: The file is damaged in its archive.
            QexpError: The disk cannot read it; this does not count as a bad image.
        """
        try:
            return (self.path / name).read_bytes() if self.path.is_dir() else self.archive().read(name)
        except OSError as error:
            raise QexpError(f"{self.path / name}: cannot be read ({error})") from error
        except (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError) as error:  # the last: it is encrypted
            raise BadImage(f"damaged in its archive ({error})") from error
