"""The embedded digits: real, split once and for all, and good enough to distinguish methods."""

import subprocess
import sys

import torch

from qexp.data.digits import Digits


def test_sizes_and_class_balance():
    data = Digits()
    loaders = (data.train_dataloader(), data.val_dataloader(), data.test_dataloader())
    labels = [torch.cat([y for _, y in loader]) for loader in loaders]
    assert [len(y) for y in labels] == [1097, 200, 500]
    assert labels[1].bincount().tolist() == [20] * 10
    assert labels[2].bincount().tolist() == [50] * 10


def test_every_image_is_in_exactly_one_split():
    from sklearn.datasets import load_digits

    arrays = Digits().arrays
    ours = torch.cat([arrays.train_images, arrays.test_images]).flatten(1).tolist()
    assert sorted(ours) == sorted(load_digits().data.astype(int).tolist())


def test_test_split_does_not_follow_the_seed():
    assert torch.equal(Digits(seed=1).arrays.test_images, Digits(seed=2).arrays.test_images)


def test_default_normalisation_centres_the_images():
    images = torch.cat([x for x, _ in Digits().train_dataloader()])
    assert abs(images.mean()) < 0.02 and abs(images.std() - 1) < 0.02


def test_package_import_stays_light():
    heavy = "[m for m in sys.modules if 'lightning' in m or 'vision' in m]"
    code = f"import sys, qexp, qexp.models.cifar_resnet; print({heavy})"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"
