"""Verification: the protocol by hand, the parts disjoint, what is missing or damaged named."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from qexp.data.faces import FacePairs
from qexp.data.pair_lists import Pair, every_kind, make_pairs, read_pairs, set_aside
from qexp.errors import QexpError
from qexp.report.verification import rates
from qexp.tasks.verification import best_threshold, compare, judge, tar_at_far
from tests.people import PEOPLE, write_people


@pytest.fixture(scope="session")
def faces(tmp_path_factory) -> Path:
    """A folder of people and their pairs."""
    return write_people(tmp_path_factory.mktemp("faces"))


def data(faces: Path, **options) -> FacePairs:
    defaults = {
        "size": (32, 32),
        "batch_size": 8,
        "eval_batch_size": 10,
        "mean": [0.5] * 3,
        "std": [0.5] * 3,
        "held_out": 4,
    }
    return FacePairs(root=str(faces / "images"), pairs=str(faces / "pairs.csv"), **{**defaults, **options})


def test_thresholds_are_the_best_ones_by_trying_all():
    rng = np.random.default_rng(1)
    for _ in range(20):
        same = rng.random(30) < 0.5
        cosines = np.clip(rng.normal(0.3 * same, 0.2), -1, 1)
        right = [((cosines > t) == same).mean() for t in np.linspace(-1, 1, 20001)]
        assert ((cosines > best_threshold(cosines, same)) == same).mean() == max(right)
    assert best_threshold(np.array([-0.5, 0.5]), np.array([False, True])) == pytest.approx(
        -0.5, abs=1e-4
    )  # the lowest best


def test_a_pair_is_judged_by_the_other_folds():
    """Two folds whose best thresholds differ: each is judged with the other's."""
    x = np.array([[1.0, 0.0]] * 4 + [[-1.0, 0.0]] * 4)
    angles = np.array([0.2, 1.0, 0.4, 1.2])
    y = np.concatenate([np.stack([np.cos(angles), np.sin(angles)], 1), -np.stack([np.cos(angles), np.sin(angles)], 1)])
    same = np.array([True, False, True, False, True, True, False, False])
    folds = np.array([0, 0, 0, 0, 1, 1, 1, 1])
    cosines, correct = judge(x, y, same, folds)
    for fold in (0, 1):
        own = folds == fold
        all_cosines = compare(x, y, x[~own], y[~own])
        threshold = best_threshold(all_cosines[~own], same[~own])
        assert (correct[own] == ((all_cosines[own] > threshold) == same[own])).all()
        np.testing.assert_allclose(cosines[own], all_cosines[own])
    assert not correct.all()


def test_rates_of_a_case_by_hand():
    cosines = np.array([0.9, 0.8, 0.7, 0.6, 0.5, 0.4])
    same = np.array([True, True, False, True, False, False])
    assert tar_at_far(cosines, same, 0.34) == 1.0  # one stranger of three may pass
    assert tar_at_far(cosines, same, 0.3) == pytest.approx(2 / 3)
    far, tar = rates(cosines, same)
    np.testing.assert_allclose(far, [0, 0, 0, 1 / 3, 1 / 3, 2 / 3, 1])
    np.testing.assert_allclose(tar, [0, 1 / 3, 2 / 3, 2 / 3, 1, 1, 1])


def test_the_official_list_is_read(tmp_path):
    path = tmp_path / "pairs.txt"
    path.write_text("2 1\nAnn 1 4\nAnn 1 Bob 2\nBob 3 4\nBob 3 Cy 10\n")
    assert read_pairs(path) == [
        Pair("Ann/Ann_0001.jpg", "Ann/Ann_0004.jpg", True, 0),
        Pair("Ann/Ann_0001.jpg", "Bob/Bob_0002.jpg", False, 0),
        Pair("Bob/Bob_0003.jpg", "Bob/Bob_0004.jpg", True, 1),
        Pair("Bob/Bob_0003.jpg", "Cy/Cy_0010.jpg", False, 1),
    ]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("2 300\nAnn 1 4\n", "cut short"),
        ("ten\n", "number of folds"),
        ("1 1\nAnn 1\nBob 1 2\n", "line 2"),
        ("0,a.jpg,b.jpg,yes\n", "same 0 or 1"),
        ("0,a.jpg,a.jpg,1\n", "paired with itself"),
        ("0,a.jpg,b.jpg,1\n1,b.jpg,a.jpg,0\n", "both as one person and as two people"),
        ("1 1\nAnn 1 Bob 2 3\nBob 1 2\n", "line 2"),
        ("", "number of folds"),
        ("fold,a,b,same\n", "no pairs in it"),
        ("0 0\n", "no pairs in it"),
    ],
)
def test_lists_that_are_none_are_refused(tmp_path, text, says):
    (tmp_path / "pairs").write_text(text)
    with pytest.raises(QexpError, match=says):
        read_pairs(tmp_path / "pairs")


def test_a_pair_that_stands_twice_counts_once(tmp_path, caplog):
    (tmp_path / "pairs").write_text("0,a/1.jpg,b/1.jpg,0\n0,b/1.jpg,a/1.jpg,0\n1,a/1.jpg,b/1.jpg,0\n")
    assert len(read_pairs(tmp_path / "pairs")) == 2
    assert "1 pairs occur twice in their fold" in caplog.text


def test_few_pairs_are_of_every_fold_and_kind(faces):
    """The beginning of a list is of one fold and one kind: "one person" would always be right."""
    pairs = [Pair(f"{fold}{same}{i}", "b", same, fold) for fold in range(2) for same in (True, False) for i in range(5)]
    few = every_kind(pairs, 8)
    assert sorted((p.fold, p.same) for p in few) == sorted([(f, s) for f in range(2) for s in (True, False)] * 2)
    assert few == sorted(few, key=pairs.index) and every_kind(pairs, None) == pairs
    assert len({(p.fold, p.same) for p in data(faces, max_samples=6).pairs}) == 6


def test_pairs_set_aside_share_no_image_with_the_rest():
    pairs = [Pair(f"p{i}/1", f"p{i}/2", True, 0) for i in range(20)]
    pairs += [Pair(f"p{i}/1", f"p{(i + 1) % 20}/2", False, 0) for i in range(20)]
    held, rest = set_aside(pairs, 6, seed=3)
    assert sum(p.same for p in held) == 3 and len(held) == 6
    assert not {n for p in held for n in (p.a, p.b)} & {n for p in rest for n in (p.a, p.b)}
    assert set_aside(pairs, 6, seed=3) == (held, rest)


def test_the_three_parts_share_no_image(faces):
    d = data(faces)  # images 3 and 4 of each person are in no pair
    assert len(d.pairs) == 2 * PEOPLE and d.left_out == 0 and len(d.held_out) == 4
    judged, held = ({n for p in part for n in (p.a, p.b)} for part in (d.pairs, d.held_out))
    trained = {name for name, i in d.places.items() if d.people[i] >= 0}
    assert trained and not judged & held and not judged & trained and not held & trained
    assert all((Path(p.a).parent == Path(p.b).parent) == p.same for p in d.held_out)
    d = data(faces, held_out=6, train_folds=[2])
    assert {p.fold for p in d.pairs} == {0, 1} and int(d.people.max()) > 0
    assert sum(p.same for p in make_pairs([f"p{i}/{j}" for i in range(5) for j in range(2)], 10, 0)) == 5


def test_channels_come_in_the_checkpoints_order(faces):
    rgb, bgr = data(faces), data(faces, channel_order="bgr")
    assert torch.equal(rgb.example().flip(1), bgr.example()) and not torch.equal(rgb.example(), bgr.example())
    assert torch.equal(rgb.faces, bgr.faces) and rgb.faces.dtype == torch.uint8 and rgb.faces.shape[1:] == (3, 32, 32)
    assert data(faces).fingerprint() != data(faces, channel_order="bgr").fingerprint()


def test_what_is_missing_is_named(faces, tmp_path):
    (tmp_path / "pairs.csv").write_text("0,P0/P0_0001.png,Nobody/Nobody_0001.png,0\n")
    broken = data(faces, held_out=0)
    broken.list = tmp_path / "pairs.csv"
    with pytest.raises(QexpError, match=r"1 images .* missing: Nobody/Nobody_0001\.png"):
        broken.setup()
    with pytest.raises(QexpError, match="held_out=0 leaves no calibration images"):
        data(faces, held_out=0).calibration_batches(4, 2, 0)
    with pytest.raises(QexpError, match="no folder and no zip file"):
        FacePairs(**{**vars_of(faces), "root": str(tmp_path / "nowhere")}).setup()
    with pytest.raises(QexpError, match="no fold 7"):
        data(faces, folds=[7]).setup()
    with pytest.raises(QexpError, match="max_samples=0"):
        data(faces, max_samples=0)
    with pytest.raises(QexpError, match="held_out=-1"):
        data(faces, held_out=-1)
    with pytest.raises(QexpError, match="no pair is left to judge"):
        data(faces, train_folds=[0, 1, 2]).setup()


def vars_of(faces: Path) -> dict:
    return {
        "root": str(faces / "images"),
        "pairs": str(faces / "pairs.csv"),
        "size": (32, 32),
        "batch_size": 8,
        "eval_batch_size": 8,
        "mean": [0.5] * 3,
        "std": [0.5] * 3,
    }


def test_a_damaged_image_is_named(tmp_path, faces):
    for name in ("P0/P0_0001.png", "P0/P0_0002.png"):
        target = tmp_path / "images" / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes((faces / "images" / name).read_bytes()[:-400])
    (tmp_path / "pairs.csv").write_text("0,P0/P0_0001.png,P0/P0_0002.png,1\n")
    with pytest.raises(QexpError, match=r"P0_0001\.png is damaged"):
        data(tmp_path, held_out=0).setup()


@pytest.mark.parametrize("mode", ["L", "CMYK", "RGBA", "P"])
def test_faces_of_any_mode_become_rgb_and_sixteen_bits_are_refused(tmp_path, mode):
    for n in (1, 2):
        path = tmp_path / "images" / "A" / f"A_{n:04d}.{'jpg' if mode == 'CMYK' else 'png'}"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (32, 32), 102).convert("RGB").convert(mode).save(path)
    (tmp_path / "pairs.csv").write_text(f"0,A/{path.name.replace('0002', '0001')},A/{path.name},1\n")
    assert (data(tmp_path, held_out=0).faces.int() - 102).abs().max() <= 2
    Image.fromarray(np.full((32, 32), 40_000, np.uint16)).save(path, "PNG")
    with pytest.raises(QexpError, match=r"A_0002.*not 8 bits per channel"):
        data(tmp_path, held_out=0).setup()


def test_training_on_people_who_are_judged_is_said(faces, caplog):
    data(faces).train_dataloader()
    assert "people in judged pairs also have training images" in caplog.text
