"""Detection sets: where boxes end up, what is left out and counted, and what is an error."""

import io
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from qexp.data.detection_augment import augmented
from qexp.data.voc import VOC, VOCZips
from qexp.errors import QexpError

OPTIONS = {"batch_size": 2, "eval_batch_size": 2, "size": [16, 8], "mean": [0, 0, 0], "std": [1, 1, 1]}
OBJECT = """<object><name>{name}</name><difficult>{difficult}</difficult><bndbox>
<xmin>{0}</xmin><ymin>{1}</ymin><xmax>{2}</xmax><ymax>{3}</ymax></bndbox></object>"""


def jpeg(mode: str = "RGB", size=(40, 20), color=None) -> bytes:
    color = color if color is not None else {"RGB": (200, 40, 10), "L": 90, "CMYK": (10, 200, 30, 0)}[mode]
    file = io.BytesIO()
    Image.new(mode, size, color).save(file, "JPEG")
    return file.getvalue()


@pytest.fixture
def devkit(tmp_path) -> Path:
    folder = tmp_path / "VOCdevkit" / "VOC2007"
    for name in ("Annotations", "JPEGImages", "ImageSets/Main"):
        (folder / name).mkdir(parents=True)
    (folder / "ImageSets/Main/trainval.txt").write_text("a\nb\nc\n")
    (folder / "ImageSets/Main/test.txt").write_text("d\n")
    for name, mode in zip("abcd", ("RGB", "L", "CMYK", "RGB")):
        (folder / f"JPEGImages/{name}.jpg").write_bytes(jpeg(mode))
    annotate(folder, "a", [((1, 1, 40, 20), "dog", 0), ((11, 6, 20, 15), "cat", 1)])
    annotate(folder, "b", [((30, 10, 60, 20), "person", 0), ((5, 5, 5, 4), "person", 0), ((41, 1, 50, 9), "car", 0)])
    annotate(folder, "c", [])
    annotate(folder, "d", [((1, 1, 10, 10), "bus", 0)])
    return tmp_path


def annotate(folder: Path, name: str, objects) -> None:
    body = "".join(OBJECT.format(*corners, name=kind, difficult=hard) for corners, kind, hard in objects)
    (folder / f"Annotations/{name}.xml").write_text(f"<annotation>{body}</annotation>")


def opened(root: Path, **changes) -> VOC:
    data = VOC(root, **{**OPTIONS, "calibration_size": 1, **changes})
    data.setup()
    return data


def test_a_box_of_the_whole_image_spans_it_and_faults_are_cut_or_left_out_and_counted(devkit):
    data = opened(devkit)
    a, b, c = data.splits["train"]
    assert a.objects.boxes.tolist() == [[0, 0, 1, 1], pytest.approx([0.25, 0.25, 0.5, 0.75])]
    assert a.objects.labels.tolist() == [11, 7] and a.objects.difficult.tolist() == [False, True]
    assert b.objects.boxes.tolist() == [pytest.approx([29 / 40, 9 / 20, 1, 1])]
    assert len(c.objects.boxes) == 0
    assert data.findings == {"clipped_boxes": 1, "difficult_boxes": 1, "empty_boxes": 2}
    given = opened(devkit, corners="as_given").splits["train"][0]
    assert given.objects.boxes[0].tolist() == pytest.approx([1 / 40, 1 / 20, 1, 1])


def test_images_of_any_mode_become_rgb_batches_with_targets(devkit):
    data = opened(devkit, calibration_size=4)
    images, targets = next(iter(data.val_dataloader()))
    assert images.shape == (2, 3, 16, 8) and 0 <= float(images.min()) <= float(images.max()) <= 1
    assert all(t["boxes"].shape == (len(t["labels"]), 4) and t["difficult"].dtype == torch.bool for t in targets)
    with pytest.raises(QexpError, match=r"holds out all 3 training images, .* dataset\.data\.calibration_size=2"):
        data.train_dataloader()
    assert data.notes()["calibration_from"] == "3 images of the training side, seed 0"
    assert [b.shape for b in data.calibration_batches(3, 2, 0)] == [(2, 3, 16, 8), (1, 3, 16, 8)]


def test_the_channel_order_is_that_of_the_weights(devkit):
    rgb, bgr = (opened(devkit, channel_order=order).example()[0, :, 8, 4] for order in ("rgb", "bgr"))
    assert rgb.tolist() == bgr.flip(0).tolist() and rgb[0] > rgb[2]
    caffe = opened(devkit, channel_order="bgr", mean=[104, 117, 123], max_value=1).example()[0, :, 8, 4]
    assert caffe.tolist() == pytest.approx((bgr * 255 - torch.tensor([104.0, 117, 123])).tolist(), abs=1e-4)
    with pytest.raises(QexpError, match="use rgb or bgr"):
        opened(devkit, channel_order="gbr")


def test_an_image_without_annotation_or_file_is_left_out_and_counted(devkit):
    folder = devkit / "VOCdevkit/VOC2007"
    (folder / "Annotations/a.xml").unlink()
    (folder / "JPEGImages/b.jpg").unlink()
    data = opened(devkit)
    assert [p.name for p in data.splits["train"]] == ["c.jpg"]
    assert data.findings == {"missing_annotations": 1, "missing_images": 1}


@pytest.mark.parametrize(
    ("fault", "says"),
    [
        (lambda f: (f / "Annotations/a.xml").write_text("<annotation><object>"), "no readable VOC annotation"),
        (lambda f: annotate(f, "a", [((1, 1, 9, 9), "doggo", 0)]), r"class 'doggo' \(did you mean 'dog'"),
        (lambda f: annotate(f, "a", [((1, 1, "nan", 9), "dog", 0)]), "finite numbers"),
        (lambda f: (f / "JPEGImages/a.jpg").write_bytes(b"no image"), "not a readable image"),
        (lambda f: (f / "ImageSets/Main/test.txt").unlink(), "no such list; there are trainval"),
        (lambda f: (f / "ImageSets/Main/test.txt").write_text(""), "the test split holds no annotated image"),
        (lambda f: (f / "JPEGImages").rename(f / "Images"), "unpack the archives"),
    ],
)
def test_damaged_input_is_an_error_that_names_it(devkit, fault, says):
    fault(devkit / "VOCdevkit/VOC2007")
    with pytest.raises(QexpError, match=says):
        opened(devkit)


def test_an_image_listed_twice_is_tested_once_and_one_in_both_lists_is_refused(devkit):
    lists = devkit / "VOCdevkit/VOC2007/ImageSets/Main"
    names = (lists / "test.txt").read_text()
    (lists / "test.txt").write_text(names + names)
    data = opened(devkit)
    assert len(data.splits["test"]) == len(names.split()) == data.findings["duplicate_images"]
    (lists / "test.txt").write_text(names + "a\n")
    with pytest.raises(QexpError, match="1 images are in the train and in the test split"):
        opened(devkit)


def test_a_truncated_jpeg_is_named_when_it_is_decoded(devkit):
    path = devkit / "VOCdevkit/VOC2007/JPEGImages/d.jpg"
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (60, 60, 3), dtype=np.uint8))
    noise.save(path)
    path.write_bytes(path.read_bytes()[:1000])
    data = opened(devkit)
    with pytest.raises(QexpError, match=r"d\.jpg: cannot be decoded"):
        next(iter(data.test_dataloader()))


def test_an_epoch_is_the_same_again_and_the_next_one_another(devkit):
    data = opened(devkit)

    def epoch(number):
        loader = data.train_dataloader()
        loader.sampler.set_epoch(number)
        return torch.cat([images for images, _ in loader])

    assert torch.equal(epoch(0), epoch(0)) and not torch.equal(epoch(0), epoch(1))
    assert len(data.train_part) == 2 and not set(data.train_part.tolist()) & set(data.calibration_part.tolist())


def test_augmentation_keeps_boxes_on_their_objects():
    pixels = np.zeros((60, 90, 3), np.uint8)
    pixels[20:40, 30:60] = 255
    box = torch.tensor([[30 / 90, 20 / 60, 60 / 90, 40 / 60]])
    changed = 0
    for seed in range(30):
        image, boxes, which = augmented(Image.fromarray(pixels), box, seed)
        assert which.tolist() == [0] and bool((boxes >= 0).all()) and bool((boxes <= 1).all())
        scale = torch.tensor([*image.size, *image.size])
        x1, y1, x2, y2 = (boxes[0] * scale).round().int().tolist()
        inside = np.asarray(image).astype(float).mean(2)[y1 + 1 : y2 - 1, x1 + 1 : x2 - 1]
        assert inside.size and inside.min() > 0.5 * np.asarray(image).astype(float).mean(2).max(), seed
        changed += image.size != (90, 60)
    assert changed > 5


@pytest.fixture
def zips(tmp_path) -> Path:
    for name, images in (("one", ("a", "b")), ("two", ("c",))):
        with zipfile.ZipFile(tmp_path / f"{name}.zip", "w") as archive:
            for image in images:
                archive.writestr(f"{image}.jpg", jpeg())
        rows = [f"{image}.jpg,1,1,20,10,dog" for image in images]
        (tmp_path / f"{name}_boxes.csv").write_text("\n".join(["image,xmin,ymin,xmax,ymax,class", *rows]) + "\n")
    return tmp_path


def test_zips_with_tables_count_what_does_not_fit(zips):
    table = zips / "one_boxes.csv"
    table.write_text(table.read_text().replace("b.jpg", "gone.jpg"))
    data = VOCZips(zips, "one", "two", **OPTIONS, calibration_size=1)
    data.setup()
    assert [p.name for p in data.splits["train"]] == ["a.jpg"]
    assert data.findings == {"missing_annotations": 1, "missing_images": 1}
    assert data.splits["train"][0].objects.boxes.tolist() == [[0, 0, 0.5, 0.5]]
    other = VOCZips(zips, "one", "two", **OPTIONS, calibration_size=1, corners="as_given")
    assert data.fingerprint() != other.fingerprint()


@pytest.mark.parametrize(
    ("fault", "says"),
    [
        (lambda f: (f / "one_boxes.csv").unlink(), "no such file; the boxes"),
        (lambda f: (f / "one_boxes.csv").write_text("image,class\n"), "no column xmin"),
        (lambda f: (f / "one_boxes.csv").write_text("image,xmin,ymin,xmax,ymax,class\na.jpg,1,x,3,4,dog\n"), "line 2"),
        (lambda f: (f / "one.zip").write_bytes((f / "one.zip").read_bytes()[:99]), "cut short or not a zip file"),
        (lambda f: (f / "one.zip").unlink(), "has two"),
    ],
)
def test_damaged_zips_and_tables_are_errors(zips, fault, says):
    fault(zips)
    with pytest.raises(QexpError, match=says):
        VOCZips(zips, "one", "two", **OPTIONS, calibration_size=1).setup()
