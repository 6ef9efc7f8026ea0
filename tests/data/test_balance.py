"""Class-balanced draws: even, seeded, nested, and sensible when a class runs out."""

import pytest
import torch

from qexp.data.balance import balanced


@pytest.fixture
def labels() -> torch.Tensor:
    return torch.arange(200) % 10


@pytest.mark.parametrize("n", [1, 7, 10, 55, 200])
def test_class_counts_differ_by_at_most_one(labels, n):
    drawn = balanced(labels, n, seed=3)
    counts = labels[drawn].bincount(minlength=10)
    assert len(drawn.unique()) == len(drawn) == n
    assert counts.max() - counts.min() <= 1


def test_seed_decides_the_draw(labels):
    assert balanced(labels, 50, 1).tolist() == balanced(labels, 50, 1).tolist()
    assert balanced(labels, 50, 1).tolist() != balanced(labels, 50, 2).tolist()


def test_larger_draw_appends_to_the_smaller(labels):
    assert balanced(labels, 80, 5)[:33].tolist() == balanced(labels, 33, 5).tolist()


def test_each_run_of_class_count_images_holds_every_class_once(labels):
    drawn = labels[balanced(labels, 100, 0)].view(10, 10)
    assert (drawn.sort(dim=1).values == torch.arange(10)).all()


def test_a_class_that_runs_out_is_made_up_for_by_the_others():
    labels = torch.tensor([0] * 3 + [1] * 50 + [2] * 50)
    assert labels[balanced(labels, 43, 0)].bincount().tolist() == [3, 20, 20]


def test_remainder_favours_no_class():
    labels = torch.arange(1000) % 10
    first = torch.stack([labels[balanced(labels, 1, seed)].squeeze() for seed in range(200)])
    assert first.bincount(minlength=10).min() > 5  # 20 expected each


def test_asking_for_too_many_returns_all_and_none_returns_none(labels):
    assert sorted(balanced(labels, 999, 0).tolist()) == list(range(200))
    assert len(balanced(labels[:0], 5, 0)) == 0
