"""Average precision against cases computed by hand, and the rules about difficult objects."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qexp.tasks.mean_ap import FALSE, IGNORED, TRUE, Matches, average_precision, bootstrap, interval, match, mean_ap

# Seven detections, best first, of five objects: right, right, wrong, wrong, right, wrong, right.
# recall .2 .4 .4 .4 .6 .6 .8, precision 1 1 2/3 1/2 3/5 1/2 4/7
HITS = np.array([1, 1, 0, 0, 1, 0, 1])
AREA = 0.2 * (1 + 1 + 3 / 5 + 4 / 7)
ELEVEN = (5 * 1 + 2 * 3 / 5 + 2 * 4 / 7) / 11  # recall 0 .. .4, then .5 and .6, then .7 and .8; nothing at .9 and 1


def found(hits, positives, images=None, labels=None):
    n = len(hits)
    images = np.zeros(n, int) if images is None else np.asarray(images)
    labels = np.zeros(n, int) if labels is None else np.asarray(labels)
    return Matches(images, labels, np.linspace(1, 0.1, n), np.asarray(hits, np.int8), np.asarray(positives))


@pytest.mark.parametrize(("points", "expected"), [(11, ELEVEN), (None, AREA)])
def test_a_case_by_hand(points, expected):
    one = average_precision(HITS[None], 1 - HITS[None], np.array([5]), points)
    assert one[0] == pytest.approx(expected, abs=1e-15)


def test_three_of_ten_is_a_recall_of_three_tenths():
    hits = np.ones((1, 3), int)
    assert average_precision(hits, 1 - hits, np.array([10]), 11)[0] == pytest.approx(4 / 11)


def test_classes_without_objects_are_left_out_and_those_without_detections_count_as_zero():
    case = found(HITS, [[5, 2, 0]])
    assert mean_ap(case, points=None)[0] == pytest.approx(AREA / 2)
    assert mean_ap(case, points=None, least=3)[0] == pytest.approx(AREA)
    assert np.isnan(mean_ap(found([], np.zeros((2, 3), int)))[0])


def boxes(*rows):
    return torch.tensor(rows, dtype=torch.float32)


def test_of_two_detections_on_one_object_the_better_scored_is_right():
    true = boxes([0, 0, 10, 10])
    both = boxes([0, 0, 10, 9], [0, 0, 10, 10])
    hit = match(
        both, torch.tensor([0, 0]), torch.tensor([0.9, 0.8]), true, torch.tensor([0]), torch.tensor([False]), 0.5
    )
    assert hit.tolist() == [TRUE, FALSE]


def test_a_detection_on_a_difficult_object_counts_neither_way_however_often():
    true = boxes([0, 0, 10, 10], [20, 20, 30, 30])
    seen = boxes([0, 0, 10, 10], [0, 0, 10, 9], [20, 20, 30, 30], [50, 50, 60, 60])
    hit = match(
        seen, torch.zeros(4, dtype=torch.int64), torch.ones(4), true, torch.zeros(2), torch.tensor([True, False]), 0.5
    )
    assert hit.tolist() == [IGNORED, IGNORED, TRUE, FALSE]
    case = Matches(np.zeros(4, int), np.zeros(4, int), np.ones(4), hit, np.array([[1]]))
    assert mean_ap(case, points=None)[0] == 1.0, "one object, found first; the false one comes after"


def test_overlap_of_just_a_half_another_class_or_no_object_is_wrong():
    true, none = boxes([0, 0, 10, 10]), torch.zeros(0, 4)
    half, label = boxes([0, 0, 10, 5]), torch.tensor([1])
    hit = match(half, label, torch.ones(1), true, label, torch.tensor([False]), 0.5)
    assert hit.tolist() == [FALSE]
    assert match(true, label, torch.ones(1), true, label + 1, torch.tensor([False]), 0.5).tolist() == [FALSE]
    empty = torch.zeros(0)
    assert match(true, label, torch.ones(1), none, empty, empty.bool(), 0.5).tolist() == [FALSE]


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 2), st.sampled_from([-1, 0, 1])), max_size=40), st.data())
def test_weighting_an_image_twice_is_having_it_twice(rows, data):
    image, label, hit = (np.array([r[i] for r in rows], dtype=int) for i in range(3))
    positives = np.zeros((6, 3), int)
    for i, c, h in rows:
        positives[i, c] += h == 1
    positives += np.array(data.draw(st.lists(st.integers(0, 2), min_size=18, max_size=18))).reshape(6, 3)
    times = np.array(data.draw(st.lists(st.integers(0, 2), min_size=6, max_size=6)))
    score = np.linspace(1, 0.5, len(rows))
    once = Matches(image, label, score, hit, positives)
    copies = [np.flatnonzero(image == i) for i in np.repeat(np.arange(6), times)]
    at = np.concatenate([np.zeros(0, int), *copies])
    number = np.concatenate([np.zeros(0, int), *(np.full(len(c), k) for k, c in enumerate(copies))])
    twice = Matches(number, label[at], score[at], hit[at], np.repeat(positives, times, 0))
    for points in (11, None):
        assert mean_ap(once, times[None], points)[0] == pytest.approx(mean_ap(twice, None, points)[0], nan_ok=True)


def test_the_interval_is_seeded_and_holds_the_value():
    generator = np.random.default_rng(1)
    n = 400
    image = np.repeat(np.arange(100), 4)
    case = Matches(image, np.zeros(n, int), generator.random(n), generator.integers(0, 2, n), np.full((100, 1), 3))
    low, high = interval(case, 11)
    assert (low, high) == interval(case, 11)
    assert low < mean_ap(case, points=11)[0] < high
    assert bootstrap(100).sum(1).tolist() == [100] * 1000
