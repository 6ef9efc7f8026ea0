"""What holds for every data set: parts apart, balanced calibration draws, a hash of the content, readable errors."""

import logging

import pytest
import torch

from qexp.data.base import Arrays, ImageData
from qexp.errors import QexpError


class Colours(ImageData):
    """300 training and 60 test images of 5 classes, unlike each other."""

    num_classes = 5
    class_names = tuple("abcde")
    tweak: dict[str, torch.Tensor] = {}

    def read(self) -> Arrays:
        g = torch.Generator().manual_seed(0)
        images = torch.randint(0, 256, (360, 3, 8, 8), dtype=torch.uint8, generator=g)
        labels = torch.arange(360) % 5
        return Arrays(images[:300], labels[:300], images[300:], labels[300:])._replace(**self.tweak)


def colours(tweak=None, **options) -> Colours:
    defaults = {"batch_size": 32, "eval_batch_size": 50, "mean": [0.5] * 3, "std": [0.25] * 3, "calibration_size": 100}
    data = Colours(**{**defaults, **options})
    data.tweak = tweak or {}
    return data


def seen(loader) -> set[bytes]:
    return {image.numpy().tobytes() for images, _ in loader for image in images}


def test_train_calibration_and_test_share_no_image():
    data = colours()
    parts = [seen(loader) for loader in (data.train_dataloader(), data.val_dataloader(), data.test_dataloader())]
    assert [len(p) for p in parts] == [200, 100, 60]
    assert not (parts[0] & parts[1] or parts[0] & parts[2] or parts[1] & parts[2])


def test_calibration_draw_comes_from_the_calibration_part_and_is_balanced_and_seeded():
    data = colours()
    indices = data.calibration_indices(40, seed=1)
    assert set(indices) <= set(data.calibration_part.tolist()) and len(set(indices)) == 40
    assert data.arrays.train_labels[indices].bincount().tolist() == [8] * 5
    assert indices == colours().calibration_indices(40, seed=1) != data.calibration_indices(40, seed=2)


def test_calibration_batches_are_the_indexed_images_unaugmented():
    data = colours(augment={"padding": 2, "flip": True})
    batches = data.calibration_batches(40, 16, seed=1)
    assert [len(b) for b in batches] == [16, 16, 8]
    expected = data.normalize(data.arrays.train_images[data.calibration_indices(40, seed=1)])
    assert torch.equal(torch.cat(batches), expected)


def test_too_few_calibration_images_are_used_and_said(caplog):
    with caplog.at_level(logging.WARNING):
        indices = colours().calibration_indices(512, seed=0)
    assert len(indices) == 100
    assert "512 calibration images asked for, 100 are held out" in caplog.text


def test_seed_moves_the_calibration_part():
    assert colours(seed=1).calibration_part.tolist() != colours(seed=2).calibration_part.tolist()
    assert colours(seed=1).calibration_part.tolist() == colours(seed=1).calibration_part.tolist()


def test_max_samples_takes_the_first_test_images():
    data = colours(max_samples=7)
    assert torch.cat([y for _, y in data.test_dataloader()]).tolist() == data.arrays.test_labels[:7].tolist()


def test_only_training_batches_are_shuffled_and_augmented():
    data = colours(augment={"padding": 2, "flip": True})
    assert seen(data.val_dataloader()) <= seen(colours().val_dataloader())
    assert not seen(data.train_dataloader()) <= seen(colours().train_dataloader())


def test_example_has_the_shape_of_the_networks_input():
    assert colours(size=12).example().shape == (1, 3, 12, 12)


def test_preprocessing_is_plain_data():
    assert colours(augment={"padding": 4}).preprocessing == {
        "mean": (0.5,) * 3,
        "std": (0.25,) * 3,
        "max_value": 255.0,
        "size": None,
        "channel_order": "rgb",
        "augment": {"padding": 4, "flip": False},
    }


def test_fingerprint_follows_content_and_normalisation_only():
    one = colours().fingerprint()
    assert one == colours(seed=9, batch_size=7, augment={"flip": True}).fingerprint()
    assert one != colours(mean=[0.4] * 3).fingerprint()
    pixel = colours().arrays.train_images.clone()
    pixel[5, 0, 0, 0] ^= 1
    assert one != colours({"train_images": pixel}).fingerprint()


@pytest.mark.parametrize(
    ("tweak", "message"),
    [
        ({"train_labels": torch.zeros(300)}, "train labels are torch.float32"),
        ({"test_labels": torch.zeros(9, dtype=torch.int64)}, r"test labels are torch.int64 \[9\]; integers \[60\]"),
        ({"train_labels": torch.full((300,), 5)}, r"span 5..5; allowed: 0..4"),
        ({"train_images": torch.zeros(300, 3, 8, 8)}, "train images are torch.float32"),
        ({"test_images": torch.zeros(0, 3, 8, 8, dtype=torch.uint8)}, "N > 0"),
    ],
)
def test_broken_splits_are_named(tweak, message):
    with pytest.raises(QexpError, match=message):
        colours(tweak).setup()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"calibration_size": 0}, "calibration_size=0 is not allowed; hold out at least 1 of the 300 training images"),
        ({"calibration_size": -1}, "calibration_size=-1 is not allowed"),
        ({"mean": [0.5]}, "3 channels, but mean has 1"),
        ({"std": [0.2, 0.0, 0.2]}, "above 0"),
        ({"max_samples": 0}, "max_samples=0"),
        ({"augment": {"rotate": 3}}, "use the keys padding and flip"),
    ],
)
def test_impossible_arguments_are_refused(options, message):
    with pytest.raises(QexpError, match=message):
        colours(**options).setup()


@pytest.mark.parametrize("asked", [300, 301, 50_000])
def test_more_calibration_images_than_there_are_means_all(asked, caplog):
    data = colours(calibration_size=asked)
    data.setup()
    assert (
        sorted(data.calibration_part.tolist()) == list(range(300))
        and sum(len(t) for _, t in data.val_dataloader()) == 300
    )
    assert data.notes()["calibration_from"] == "300 images of the training side, seed 0"
    said = [r.getMessage() for r in caplog.records]
    line = f"dataset.data.calibration_size={asked}, but there are 300 training images; 300 are held out for calibration"
    assert [line in text for text in said] == ([True] if asked > 300 else [])
    assert sum(map(len, data.calibration_batches(400, 64, 0))) == 300
    with pytest.raises(
        QexpError, match=r"none is left to train on; name a smaller number, dataset.data.calibration_size=150"
    ):
        data.train_dataloader()


def test_no_calibration_images_is_an_error():
    with pytest.raises(QexpError, match="at least 1"):
        colours().calibration_indices(0, seed=0)
