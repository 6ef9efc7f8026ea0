"""CIFAR from either format, and an error that names the needed file when it is missing or damaged."""

import hashlib
import os
import pickle
import urllib.error
from pathlib import Path

import numpy as np
import pytest
import torch
from torchvision import datasets

from qexp.data.cifar import CIFAR10, CIFAR100, read_npz
from qexp.errors import QexpError

SMALL = {"calibration_size": 10}


def arrays(n_train=50, n_test=20, classes=10) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {
        "train_images": rng.integers(0, 256, (n_train, 32, 32, 3), dtype=np.uint8),
        "train_labels": np.arange(n_train) % classes,
        "test_images": rng.integers(0, 256, (n_test, 32, 32, 3), dtype=np.uint8),
        "test_labels": np.arange(n_test) % classes,
    }


def write_npz(root: Path, name="cifar10.npz", **changes) -> Path:
    np.savez(root / name, **{**arrays(), **changes})
    return root / name


def write_folder(root: Path, monkeypatch) -> dict[str, np.ndarray]:
    """torchvision's folder in small, with the checksums torchvision compares."""
    data, folder = arrays(), root / "cifar-10-batches-py"
    folder.mkdir()

    def dump(name: str, content: dict) -> list[str]:
        (folder / name).write_bytes(pickle.dumps(content))
        return [name, hashlib.md5((folder / name).read_bytes()).hexdigest()]

    def batch(split: str, part: slice) -> dict:
        images = data[f"{split}_images"][part].transpose(0, 3, 1, 2).reshape(-1, 3072)
        return {"data": images, "labels": data[f"{split}_labels"][part].tolist()}

    train = [dump(f"data_batch_{i}", batch("train", slice(25 * i, 25 * i + 25))) for i in range(2)]
    monkeypatch.setattr(datasets.CIFAR10, "train_list", train)
    monkeypatch.setattr(datasets.CIFAR10, "test_list", [dump("test_batch", batch("test", slice(None)))])
    name, md5 = dump("batches.meta", {"label_names": list(CIFAR10.class_names)})
    monkeypatch.setattr(datasets.CIFAR10, "meta", {"filename": name, "key": "label_names", "md5": md5})
    return data


def test_both_formats_give_the_same_tensors(tmp_path, monkeypatch):
    (tmp_path / "npz").mkdir()
    write_npz(tmp_path / "npz")
    data = write_folder(tmp_path, monkeypatch)
    ours, theirs = CIFAR10(tmp_path / "npz", **SMALL).arrays, CIFAR10(tmp_path, **SMALL).arrays
    assert all(torch.equal(a, b) for a, b in zip(ours[:4], theirs[:4], strict=True))
    assert ours.train_images[3, 1, 5, 7] == data["train_images"][3, 5, 7, 1]


def test_fewer_training_images_than_published_are_fine(tmp_path):
    write_npz(tmp_path)
    data = CIFAR10(tmp_path, **SMALL)
    assert len(data.train_part) == 40 and len(data.calibration_part) == 10


@pytest.mark.parametrize(("kind", "npz"), [(CIFAR10, "cifar10.npz"), (CIFAR100, "cifar100.npz")])
def test_missing_folder_says_what_to_bring(tmp_path, kind, npz):
    with pytest.raises(QexpError) as caught:
        kind(tmp_path / "nowhere").setup()
    for word in (npz, kind.folder, kind.archive, "is not there", "download=true", "QEXP_DATA_DIR"):
        assert word in str(caught.value)


def test_damaged_folder_is_told_from_a_missing_one(tmp_path, monkeypatch):
    write_folder(tmp_path, monkeypatch)
    (tmp_path / "cifar-10-batches-py" / "data_batch_1").write_bytes(b"cut")
    with pytest.raises(QexpError, match="is incomplete or damaged"):
        CIFAR10(tmp_path).setup()


def test_failing_download_is_reported(tmp_path, monkeypatch):
    def offline(*args, **kwargs):
        raise urllib.error.URLError("no network")

    monkeypatch.setattr(datasets.cifar, "download_and_extract_archive", offline)
    with pytest.raises(QexpError, match=r"the download failed \(.*no network"):
        CIFAR10(tmp_path, download=True).prepare_data()


def test_download_is_skipped_when_the_npz_is_there(tmp_path, monkeypatch):
    write_npz(tmp_path)
    monkeypatch.setattr(datasets.cifar, "download_and_extract_archive", None)
    CIFAR10(tmp_path, download=True, **SMALL).prepare_data()


def test_truncated_npz_is_named(tmp_path):
    path = write_npz(tmp_path)
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(QexpError, match="truncated"):
        read_npz(path)


def test_missing_array_is_named(tmp_path):
    np.savez(tmp_path / "cifar10.npz", **{k: v for k, v in arrays().items() if k != "test_labels"})
    with pytest.raises(QexpError, match="no array test_labels; the file holds train_images"):
        read_npz(tmp_path / "cifar10.npz")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train_labels": np.arange(50) / 10}, r"train_labels is float64 \[50\]; integers"),
        ({"test_images": np.zeros((20, 3, 32, 32), np.uint8)}, r"test_images is uint8 \[20, 3, 32, 32\]"),
        ({"test_images": np.zeros((20, 32, 32, 3), np.float32)}, "test_images is float32"),
        ({"train_labels": np.full(50, 10)}, "span 10..10; allowed: 0..9"),
        ({"train_labels": np.arange(50).astype(object)}, "cannot be read"),
    ],
)
def test_wrong_arrays_are_named(tmp_path, changes, message):
    write_npz(tmp_path, **changes)
    with pytest.raises(QexpError, match=message):
        CIFAR10(tmp_path, **SMALL).setup()


@pytest.mark.parametrize("kind", [CIFAR10, CIFAR100])
def test_class_names_match_the_class_count(kind):
    assert len(set(kind.class_names)) == kind.num_classes
    assert list(kind.class_names) == sorted(kind.class_names)


@pytest.mark.data
def test_real_cifar10_parts_are_disjoint_and_balanced():
    data = CIFAR10(os.environ["QEXP_DATA_DIR"])
    assert not set(data.train_part.tolist()) & set(data.calibration_part.tolist())
    assert len(data.train_part) + len(data.calibration_part) == len(data.arrays.train_labels)
    assert data.arrays.train_labels[data.calibration_part].bincount().tolist() == [100] * 10
    assert len(data.arrays.test_labels) == 10_000
