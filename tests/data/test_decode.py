"""One file to pixels: torchvision's own transforms to the bit, every mode in RGB, damage named."""

import io
import multiprocessing
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import InterpolationMode
from torchvision.transforms._presets import ImageClassification

from qexp.data.decode import BadImage, Resize, Source, of_weights, rgb
from qexp.data.tensors import Normalize
from qexp.errors import QexpError
from tests.data.pictures import picture


@pytest.mark.parametrize("how", ["bilinear", "bicubic", "nearest"])
@pytest.mark.parametrize(("width", "height"), [(70, 50), (50, 70), (33, 33), (20, 60)])
def test_pixels_are_those_of_torchvisions_preset(how, width, height):
    image, _ = rgb(picture(1, (width, height), kind="JPEG"))
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    theirs = ImageClassification(crop_size=28, resize_size=32, interpolation=InterpolationMode(how))(image)
    ours = Normalize(mean, std)(torch.from_numpy(Resize(32, 28, how)(image))[None])
    torch.testing.assert_close(ours[0], theirs, rtol=0, atol=1e-6)


def test_squashing_gives_up_the_aspect_ratio_and_a_small_image_is_padded():
    image, _ = rgb(picture(2, (80, 20)))
    squashed = np.asarray(image.resize((24, 24), Image.Resampling.BILINEAR)).transpose(2, 0, 1)
    assert np.array_equal(Resize((24, 24), 24)(image), squashed)
    assert Resize(8, 12)(image).shape == (3, 12, 12)


@pytest.mark.parametrize(
    ("mode", "kind", "tolerance"),
    [("L", "JPEG", 1), ("CMYK", "JPEG", 3), ("RGBA", "PNG", 0), ("LA", "PNG", 0), ("P", "PNG", 0), ("1", "PNG", 0)],
)
def test_other_modes_are_converted_and_their_mode_is_told(mode, kind, tolerance):
    image, stored = rgb(picture(3, mode=mode, kind=kind, **({"quality": 100} if kind == "JPEG" else {})))
    assert (image.mode, stored, image.size) == ("RGB", mode, (40, 30))
    expected = Image.open(io.BytesIO(picture(3))).convert("RGB")
    expected = expected.convert(mode).convert("RGB")
    assert np.abs(np.asarray(image).astype(int) - np.asarray(expected).astype(int)).mean() <= tolerance


def test_a_palette_with_transparency_keeps_its_colours():
    content = picture(4, mode="P", transparency=b"\x00\x80\xff")
    image, mode = rgb(content)
    assert mode == "P" and np.asarray(image).std() > 10


@pytest.mark.parametrize("share", [0.3, 0.6, 0.95])
def test_a_truncated_jpeg_is_bad(share):
    content = picture(5, (120, 90), kind="JPEG", quality=95)
    with pytest.raises(BadImage, match=r"truncated|broken"):
        rgb(content[: int(share * len(content))])


@pytest.mark.parametrize(
    ("content", "why"),
    [(b"", "empty file"), (b"<html>not found</html>", "no image"), (b"\xff\xd8\xff", "no image|truncated|broken")],
)
def test_what_is_no_image_is_bad(content, why):
    with pytest.raises(BadImage, match=why):
        rgb(content)


def test_sixteen_bits_a_channel_are_refused_rather_than_clipped():
    with pytest.raises(BadImage, match="I;16, not 8 bits"):
        rgb(picture(6, mode="I;16"))


def archive(path, n=3):
    with zipfile.ZipFile(path, "w") as file:
        for i in range(n):
            file.writestr(f"{i}.png", picture(i))
        file.writestr("__MACOSX/._0.png", b"")
    return path


def test_an_archive_reads_as_its_folder_does(tmp_path):
    source = Source(archive(tmp_path / "a.zip"))
    with zipfile.ZipFile(source.path) as file:
        file.extractall(tmp_path / "a")
    folder = Source(tmp_path / "a")
    assert source.names() == folder.names() == ["0.png", "1.png", "2.png"]
    assert [source.read(n) for n in source.names()] == [folder.read(n) for n in folder.names()]


def _reads(source, name, queue):
    queue.put(all(source.read(name) == picture(int(name[0])) for _ in range(100)))


def test_processes_that_share_an_archive_do_not_move_each_others_place(tmp_path):
    source = Source(archive(tmp_path / "a.zip"))
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    readers = [context.Process(target=_reads, args=(source, f"{i}.png", queue)) for i in range(3)]
    for reader in readers:
        reader.start()
    assert all(queue.get(timeout=30) for _ in readers)
    for reader in readers:
        reader.join()


def test_a_damaged_member_is_a_bad_image_and_a_missing_file_is_not(tmp_path):
    path = archive(tmp_path / "a.zip")
    content = bytearray(path.read_bytes())
    content[60] ^= 255
    path.write_bytes(content)
    with pytest.raises(BadImage, match="damaged in its archive"):
        Source(path).read("0.png")
    (tmp_path / "folder").mkdir()
    with pytest.raises(QexpError, match="cannot be read"):
        Source(tmp_path / "folder").read("gone.png")


def test_neither_folder_nor_archive_is_named(tmp_path):
    (tmp_path / "a.zip").write_bytes(b"PK but no archive")
    with pytest.raises(QexpError, match="neither a folder nor a readable zip"):
        Source(tmp_path / "a.zip")


def test_the_transforms_of_weights_come_from_torchvision():
    assert of_weights("IMAGENET1K_V2", "resnet50") == (232, "bilinear")
    assert of_weights("EfficientNet_B0_Weights.IMAGENET1K_V1", None) == (256, "bicubic")
    assert of_weights("Inception_V3_Weights.IMAGENET1K_V1", "inception_v3") == (342, "bilinear")
    for other in (None, "weights/file.pt", "https://x/y.pt#sha256=0", "NO_SUCH"):
        assert of_weights(other, "resnet50") is None


@pytest.mark.parametrize("wrong", [{"interpolation": "cubic"}, {"resize": 0}, {"crop": 0}, {"resize": (0, 8)}], ids=str)
def test_impossible_sizes_are_refused(wrong):
    with pytest.raises(QexpError, match=r"allowed|at least 1"):
        Resize(**{"resize": 32, "crop": 28, **wrong})
