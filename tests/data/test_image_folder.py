"""A user's own images and ImageNet's two layouts: disjoint splits, calibration reported, right labels, repeatable training."""

from __future__ import annotations

import shutil
from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.io import savemat

from qexp.data.image_folder import ImageFolder
from qexp.data.imagenet import TRUTH, ImageNet
from qexp.data.training_files import Order
from qexp.errors import QexpError
from tests.data.pictures import folders, picture

PETS = {"ant": 8, "bee": 8, "cat": 8}


def data(root, **how) -> ImageFolder:
    usual = {"num_classes": 3, "pack_dir": root / "packs", "resize": 20, "crop": 16, "calibration_size": 6}
    return ImageFolder(root, **{"name": "pets", "workers": 0, "batch_size": 4, **usual, **how})


@pytest.fixture
def pets(tmp_path):
    folders(tmp_path / "val", PETS)
    return tmp_path


@pytest.fixture
def whole(pets):
    folders(pets / "train", {"ant": 7, "bee": 9, "cat": 5}, size=(31, 47))
    return pets


def seen(loader) -> set[bytes]:
    return {image.numpy().tobytes() for images, _ in loader for image in images}


def test_without_training_images_a_part_is_set_aside_and_the_results_say_so(pets):
    one = data(pets)
    calibration, test = seen(one.val_dataloader()), seen(one.test_dataloader())
    assert len(calibration) == 6 and len(test) == 18 and not calibration & test
    assert one.notes() == {
        "calibration_from": "6 images set aside from the evaluation images, seed 0",
        "n_skipped": 0,
    }
    assert Counter(one.arrays.train_labels[one.calibration_part].tolist()) == {0: 2, 1: 2, 2: 2}
    other = data(pets, seed=1)
    assert seen(other.val_dataloader()) != calibration and one.fingerprint() != other.fingerprint()
    assert one.fingerprint() == data(pets).fingerprint()
    with pytest.raises(QexpError, match=r"nothing to train on: no training images in .*train"):
        one.train_dataloader()


def test_all_images_are_evaluated_where_nothing_is_calibrated(pets):
    one = data(pets, calibration_size=0)
    assert len(seen(one.test_dataloader())) == 24 and one.notes()["calibration_from"] == "none"
    with pytest.raises(QexpError, match="calibration_size=0 leaves no calibration images"):
        one.calibration_batches(4, 2, seed=0)


@pytest.mark.parametrize("asked", [24, 1000])
def test_half_is_set_aside_where_the_evaluation_images_do_not_suffice(asked, pets, caplog):
    one = data(pets, calibration_size=asked)
    assert len(seen(one.val_dataloader())) == len(seen(one.test_dataloader())) == 12
    assert not seen(one.val_dataloader()) & seen(one.test_dataloader())
    assert one.notes()["calibration_from"] == "12 images set aside from the evaluation images, seed 0"
    assert (
        f"calibration_size={asked}, but there are 24 evaluation images to set aside from; 12 are held out"
        in caplog.text
    )


def test_calibration_images_come_from_the_training_folder_where_there_is_one(whole):
    one = data(whole)
    assert len(seen(one.test_dataloader())) == 24, "the evaluation images are left whole"
    assert one.notes()["calibration_from"] == "6 images of the training side, seed 0"
    assert one.arrays.train_labels.bincount().tolist() == [2, 2, 2]
    assert len(seen(one.val_dataloader())) == 6 and not seen(one.val_dataloader()) & seen(one.test_dataloader())
    assert sum(len(labels) for _, labels in one.train_dataloader()) == 21 - 6
    training = one.listings[1]
    held, trained = {training.names[i] for i in one._drawn}, set(one.train_dataloader().dataset.listing.names)
    assert not held & trained and len(held | trained) == 21
    with pytest.raises(QexpError, match="calibration_size=0 is not allowed; hold out at least 1 of the 21"):
        data(whole, calibration_size=0).setup()


def test_all_training_images_serve_calibration_where_more_are_asked_for(whole, caplog):
    one = data(whole, calibration_size=1000)
    assert len(seen(one.val_dataloader())) == 21 and len(seen(one.test_dataloader())) == 24
    assert one.notes()["calibration_from"] == "21 images of the training side, seed 0"
    assert "calibration_size=1000, but there are 21 training images; 21 are held out" in caplog.text
    with pytest.raises(
        QexpError, match=r"none is left to train on; name a smaller number, dataset.data.calibration_size=11"
    ):
        one.train_dataloader()


def batches(loader, epoch):
    loader.sampler.set_epoch(epoch)
    return list(loader)


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*:DeprecationWarning")
def test_training_batches_follow_from_seed_and_epoch_whatever_the_processes(whole):
    one, two = data(whole).train_dataloader(), data(whole, workers=2).train_dataloader()
    for epoch in (0, 3):
        for (a, x), (b, y) in zip(batches(one, epoch), batches(two, epoch), strict=True):
            assert torch.equal(a, b) and torch.equal(x, y) and a.shape[1:] == (3, 16, 16)
    assert not torch.equal(batches(one, 0)[0][0], batches(one, 1)[0][0])
    assert sorted(i for i, _ in Order(9, 0)) == list(range(9))
    labels = Counter(int(y) for _, ys in batches(one, 0) for y in ys)
    assert labels == {0: 5, 1: 7, 2: 3}


def test_training_stops_at_an_image_it_cannot_decode(whole):
    one = data(whole)
    loader = one.train_dataloader()
    (whole / "train" / loader.dataset.listing.names[2]).write_bytes(b"damaged")
    with pytest.raises(QexpError, match="cannot be decoded: no image"):
        list(loader)


def test_max_samples_are_the_first_or_balanced(pets):
    first = [y for _, ys in data(pets, max_samples=7).test_dataloader() for y in ys.tolist()]
    assert len(first) == 7 and set(first) <= {0, 1}
    even = data(pets, max_samples=6, sampling="balanced")
    assert Counter(y for _, ys in even.test_dataloader() for y in ys.tolist()) == {0: 2, 1: 2, 2: 2}
    assert even.test_part.tolist() == sorted(even.test_part.tolist())
    with pytest.raises(QexpError, match="use first or balanced"):
        data(pets, sampling="random")


def test_weights_that_come_from_caffe_get_blue_first_and_0_to_255_less_a_mean(whole):
    caffe = {"channel_order": "bgr", "mean": [104, 117, 123], "std": [1, 1, 1], "max_value": 1, "resize": [24, 24]}
    one, plain = data(whole, **caffe), data(whole, resize=[24, 24])
    raw = Image.open(whole / "val/ant/0.png").resize((24, 24), Image.Resampling.BILINEAR).crop((4, 4, 20, 20))
    expected = torch.from_numpy(np.array(raw)).permute(2, 0, 1).flip(0) - torch.tensor([104.0, 117, 123])[:, None, None]
    assert torch.equal(next(iter(one.test_dataloader()))[0][0], expected)
    assert one.arrays.test_images.path == plain.arrays.test_images.path, "one pack serves both"
    assert one.fingerprint() != plain.fingerprint() and one.preprocessing["channel_order"] == "bgr"
    images, _ = batches(one.train_dataloader(), 0)[0]
    assert torch.equal(images, images.round()) and images.min() < 0 and images.max() > 1
    with pytest.raises(QexpError, match="use rgb or bgr"):
        data(whole, channel_order="gbr")
    with pytest.raises(QexpError, match="max_value=0"):
        data(whole, max_value=0)


def test_skipped_images_are_counted_in_the_results(pets):
    (pets / "val/bee/3.png").write_bytes(b"")
    one = data(pets)
    assert one.notes()["n_skipped"] == 1 and len(one.arrays.test_labels) == 23
    assert one.arrays.test_labels.bincount().tolist() == [8, 7, 8]


def test_class_counts_and_missing_folders_are_named(pets):
    with pytest.raises(QexpError, match=r"3 classes \(ant, bee, cat ...\) in .*num_classes=4; they must agree"):
        data(pets, num_classes=4).setup()
    with pytest.raises(QexpError, match=r"nowhere does not exist. Name the folder, dataset.data.root"):
        data(pets, test="nowhere").setup()
    with pytest.raises(QexpError, match=r"need dataset.data.classes"):
        data(pets, label_from="(.)").setup()
    with pytest.raises(QexpError, match="use the keys scale and flip"):
        data(pets, augment={"padding": 4})


@pytest.mark.parametrize("parts", [{"train": "val"}, {"test": None, "train": "val"}, {"train": "val/ant"}], ids=str)
def test_images_that_are_evaluated_are_never_trained_on(pets, parts):
    with pytest.raises(QexpError, match=r"hold the same images.*disjoint"):
        data(pets, **parts)


def test_a_folder_that_cannot_be_written_is_named(pets):
    (pets / "file").write_text("")
    with pytest.raises(QexpError, match=r"cannot be made or written.*pack_dir"):
        data(pets, pack_dir=pets / "file" / "packs").setup()


def test_the_transforms_follow_user_then_weights_then_network(pets):
    usual = {"resize": 342, "interpolation": "bicubic"}

    def found(**how):
        made = data(pets, **{"resize": None, "usual": usual, "network": "resnet50", **how}).resize
        return made.resize, made.interpolation

    assert found() == (342, "bicubic") and found(usual=None, crop=224) == (256, "bilinear")
    assert found(weights="IMAGENET1K_V2") == (232, "bilinear") and found(weights="a.pt") == (342, "bicubic")
    assert found(usual=None, crop=28) == (32, "bilinear")  # a small network sees as much of the image
    assert found(weights="IMAGENET1K_V2", resize=[64, 48]) == ((64, 48), "bilinear")


# --- ImageNet's layouts -------------------------------------------------------------------------------------------

WNIDS = [f"n{i:08}" for i in range(1000)]


def imagenet(root, **how) -> ImageNet:
    usual = {"pack_dir": root / "packs", "resize": 12, "crop": 8, "calibration_size": 10, "workers": 0}
    return ImageNet(root, **{**usual, **how})


@pytest.fixture(scope="module")
def thousand(tmp_path_factory):
    """A folder for each of 1,000 classes with one small image."""
    root = tmp_path_factory.mktemp("imagenet")
    content = [picture(i, (10, 8)) for i in range(5)]
    for i, wnid in enumerate(WNIDS):
        (root / "val" / wnid).mkdir(parents=True)
        (root / "val" / wnid / "ILSVRC2012_val_00000001.JPEG").write_bytes(content[i % 5])
    return root


def kit(root, order):
    """A development kit whose own numbers 1..1000 mean `order[0..999]`, with inner nodes after them."""
    (root / "devkit/data").mkdir(parents=True)
    kinds = [("ILSVRC2012_ID", "i4"), ("WNID", "O"), ("words", "O"), ("num_children", "i4")]
    rows = [(i + 1, order[i], f"words of {order[i]}", 0) for i in range(len(order))] + [(1001, "n1", "animal", 9)]
    savemat(root / "devkit/data/meta.mat", {"synsets": np.array(rows, dtype=kinds)})


def test_a_thousand_folders_are_numbered_in_order(thousand):
    one = imagenet(thousand)
    one.setup()
    assert one.arrays.test_labels.tolist() == list(range(1000))
    assert one.class_names[7] == WNIDS[7] and len(one.test_part) == 990


def test_fewer_folders_need_a_list_of_all_classes(thousand, tmp_path):
    for wnid in WNIDS[500:503]:
        shutil.copytree(thousand / "val" / wnid, tmp_path / "val" / wnid)
    with pytest.raises(QexpError, match=r"does not hold all 1000 class folders.*Put a list of all classes there"):
        imagenet(tmp_path, calibration_size=1).setup()
    (tmp_path / "LOC_synset_mapping.txt").write_text("".join(f"{w} some, words\n" for w in WNIDS))
    assert imagenet(tmp_path, calibration_size=1).arrays.test_labels.tolist() == [500, 501, 502]


def test_the_flat_folder_is_read_with_the_development_kit(tmp_path):
    (tmp_path / "val").mkdir()
    shuffled = [WNIDS[(7 * i) % 1000] for i in range(1000)]
    truth = [3, 1, 1000, 2]
    for i in range(4):
        (tmp_path / f"val/ILSVRC2012_val_{i + 1:08}.JPEG").write_bytes(picture(i))
    with pytest.raises(QexpError, match=r"images without class folders.*Unpack ILSVRC2012_devkit_t12"):
        imagenet(tmp_path, calibration_size=1).setup()
    kit(tmp_path, shuffled)
    with pytest.raises(QexpError, match=f"{TRUTH}: cannot be read"):
        imagenet(tmp_path, calibration_size=1).setup()
    (tmp_path / "devkit/data" / TRUTH).write_text("".join(f"{t}\n" for t in truth))
    one = imagenet(tmp_path, calibration_size=1)
    assert one.arrays.test_labels.tolist() == [14, 0, 6993 % 1000, 7]
    assert one.class_names[14] == "words of n00000014"
    (tmp_path / "devkit/data" / TRUTH).write_text("3\n1\n1001\n2\n")
    with pytest.raises(QexpError, match="line 3 is '1001', which is none of the 1000 classes"):
        imagenet(tmp_path, calibration_size=1).setup()
    (tmp_path / "devkit/data" / TRUTH).write_text("3\n1\n")
    with pytest.raises(QexpError, match=r"00000003.JPEG: no number 1\.\.2"):
        imagenet(tmp_path, calibration_size=1).setup()


def test_missing_imagenet_says_where_it_comes_from(tmp_path):
    with pytest.raises(QexpError, match=r"val does not exist. ImageNet is fetched by hand from https://image-net.org"):
        imagenet(tmp_path).setup()
