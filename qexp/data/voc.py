"""VOC: the standard folder (VOCdevkit), or zip files of images beside a table of boxes."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path
from typing import Any

from PIL import Image
from tqdm import tqdm

from qexp.data.annotations import Objects, objects, read_table, read_xml
from qexp.data.detection import DetectionData
from qexp.data.pictures import Picture
from qexp.errors import QexpError


class VOC(DetectionData):
    """VOC in its standard folder: `<root>/VOCdevkit/VOC2007/{Annotations,ImageSets/Main,JPEGImages}`.

    An image of the list without an annotation file is dropped and counted: without its objects every detection in it would be wrong.

    Args:
        root: Folder that holds `VOCdevkit`; `VOCdevkit` itself or the year's folder also work.
        year: `2007`, `2012`.
        train: The list to train on: `trainval`, `train`.
        test: The list to test on: `test`, `val`.
        options: Options of `DetectionData`.
    """

    def __init__(self, root: str | Path, year: int = 2007, train: str = "trainval", test: str = "test", **options: Any):
        super().__init__(**options)
        self.root, self.year, self.lists = Path(root), year, {"train": train, "test": test}

    def folder(self) -> Path:
        """The year's folder.

        Raises:
            QexpError: The folder is missing or incomplete.
        """
        name = f"VOC{self.year}"
        places = [self.root / "VOCdevkit" / name, self.root / name, self.root]
        for place in places:
            if (place / "JPEGImages").is_dir() and (place / "Annotations").is_dir():
                return place
        raise QexpError(
            f"{places[0]}: no folder with JPEGImages and Annotations; unpack the archives of "
            f"http://host.robots.ox.ac.uk/pascal/VOC/voc{self.year} under {self.root}, or set QEXP_DATA_DIR or dataset.data.root"
        )

    def read(self, split: str) -> list[Picture]:
        folder, out = self.folder(), []
        path = folder / "ImageSets" / "Main" / f"{self.lists[split]}.txt"
        if not path.is_file():
            known = sorted(p.stem for p in path.parent.glob("*.txt") if "_" not in p.stem)
            raise QexpError(
                f"{path}: no such list; there are {', '.join(known) or 'none'}. Test annotations are a separate archive"
            )
        names = [line.split()[0] for line in path.read_text().splitlines() if line.strip()]
        self.tally["duplicate_images"] += len(names) - len(set(names))
        names = list(dict.fromkeys(names))
        for name in tqdm(names, desc=f"annotations of {self.lists[split]}", leave=False, disable=len(names) < 2000):
            image, annotation = folder / "JPEGImages" / f"{name}.jpg", folder / "Annotations" / f"{name}.xml"
            if not image.is_file() or not annotation.is_file():
                self.tally["missing_images" if annotation.is_file() else "missing_annotations"] += 1
                continue
            size = _size(image.name, image)
            found = objects(read_xml(annotation), size, self.class_names, self.corners, self.tally)
            out.append(
                Picture(image.name, (str(image.relative_to(folder)), image.stat().st_size), size, shares(found, size))
            )
        return out

    def load(self, picture: Picture) -> bytes:
        return (self.folder() / picture.source[0]).read_bytes()


class VOCZips(DetectionData):
    """Zip files of images, each with its boxes in `<name>_boxes.csv` beside it (image, xmin, ymin, xmax, ymax, class[, difficult]).

    An image without a row is dropped and counted, as is a row whose image is not in the zip.

    Args:
        root: The folder.
        train: Name of the zip to train on, without `.zip`.
        test: Name of the zip to test on.
        options: Options of `DetectionData`.
    """

    def __init__(self, root: str | Path, train: str, test: str, **options: Any) -> None:
        super().__init__(**options)
        self.root, self.zips = Path(root), {"train": train, "test": test}
        if train == test:
            raise QexpError(f"VOCZips: train and test are both {train!r}; they must be disjoint")

    def read(self, split: str) -> list[Picture]:
        path = self.root / f"{self.zips[split]}.zip"
        if not path.is_file():
            known = sorted(p.stem for p in self.root.glob("*.zip"))
            raise QexpError(f"{path}: no such file; {self.root} has {', '.join(known) or 'no zip files'}")
        boxes = read_table(path.with_name(f"{path.stem}_boxes.csv"))
        out = []
        try:
            with zipfile.ZipFile(path) as archive:
                names = {Path(name).name: name for name in archive.namelist() if not name.endswith("/")}
                self.tally["missing_images"] += len(boxes.keys() - names.keys())
                for name in sorted(names):
                    if name not in boxes:
                        self.tally["missing_annotations"] += 1
                        continue
                    info = archive.getinfo(names[name])
                    size = _size(name, io.BytesIO(archive.read(info)))
                    found = objects(boxes[name], size, self.class_names, self.corners, self.tally)
                    out.append(Picture(name, (split, names[name], info.CRC), size, shares(found, size)))
        except (zipfile.BadZipFile, EOFError) as error:
            raise QexpError(
                f"{path}: cannot be read ({error}); it is cut short or not a zip file: fetch it again"
            ) from error
        return out

    def load(self, picture: Picture) -> bytes:
        split, member, _ = picture.source
        try:
            with zipfile.ZipFile(self.root / f"{self.zips[split]}.zip") as archive:
                return archive.read(member)
        except zipfile.BadZipFile as error:
            raise QexpError(f"{picture.name}: cannot be read ({error}); fetch the zip again") from error


def shares(found: Objects, size: tuple[int, int]) -> Objects:
    """Returns the objects with corners in shares of the picture's width and height."""
    return found._replace(boxes=found.boxes / found.boxes.new_tensor([*size, *size]))


def _size(name: str, file: Any) -> tuple[int, int]:
    """Returns an image's width and height from its header."""
    try:
        with Image.open(file) as image:
            return image.size
    except (OSError, SyntaxError, ValueError) as error:
        raise QexpError(f"{name}: not a readable image ({error}); fetch it again") from error
