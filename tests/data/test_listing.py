"""Which label an image gets: by folder, by list, by name; what is missing, double, empty or out of range is named."""

import pytest

from qexp.data.decode import Source
from qexp.data.listing import Classes, by_folder, by_list, by_name, read_classes
from qexp.errors import QexpError
from tests.data.pictures import folders, picture

PETS = Classes(("n01", "n02", "n03"), ("cat", "dog", "crane"))


def test_folders_in_sorted_order_are_the_classes(tmp_path):
    listing, classes = by_folder(Source(folders(tmp_path, {"dog": 2, "ant": 1, "Cat": 3})), None)
    assert classes.ids == ("Cat", "ant", "dog")
    assert dict(zip(listing.names, listing.labels)) == {
        **{f"Cat/{i}.png": 0 for i in range(3)},
        "ant/0.png": 1,
        **{f"dog/{i}.png": 2 for i in range(2)},
    }


def test_a_list_of_classes_numbers_them_and_a_class_may_then_be_absent(tmp_path):
    listing, _ = by_folder(Source(folders(tmp_path, {"n03": 1, "cat": 2})), PETS)
    assert sorted(zip(listing.names, listing.labels)) == [("cat/0.png", 0), ("cat/1.png", 0), ("n03/0.png", 2)]


def test_an_empty_class_folder_does_not_shift_the_others(tmp_path):
    root = folders(tmp_path, {"a": 1, "c": 1})
    (root / "b").mkdir()
    with pytest.raises(QexpError, match="1 class folders hold no image: b; fill or remove"):
        by_folder(Source(root), None)
    listing, _ = by_folder(Source(root), Classes(("a", "b", "c"), ("a", "b", "c")))
    assert listing.labels == (0, 2)


def test_loose_images_unknown_folders_and_no_images_are_named(tmp_path):
    root = folders(tmp_path / "x", {"n01": 1, "n0l": 1})
    with pytest.raises(QexpError, match=r"label 'n0l' is out of range; use 0\.\.2, .*did you mean"):
        by_folder(Source(root), PETS)
    (root / "loose.png").write_bytes(picture(0))
    with pytest.raises(QexpError, match=r"1 images lie outside a class folder \(loose.png\)"):
        by_folder(Source(root), PETS)
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "notes.txt").write_text("no image")
    with pytest.raises(QexpError, match="no images in it"):
        by_folder(Source(tmp_path / "empty"), None)


@pytest.fixture
def flat(tmp_path):
    root = tmp_path / "flat"
    root.mkdir()
    for name in ("a_0001.png", "b_0002.png", "c_0000.png"):
        (root / name).write_bytes(picture(1))
    return root


def test_a_list_of_labels_takes_ids_names_and_numbers_and_keeps_its_order(flat, tmp_path):
    (tmp_path / "l.csv").write_text("file,class\nc_0000.png,dog\na_0001.png,n03\nb_0002.png,0\n")
    listing = by_list(Source(flat), tmp_path / "l.csv", PETS)
    assert list(zip(listing.names, listing.labels)) == [("c_0000.png", 1), ("a_0001.png", 2), ("b_0002.png", 0)]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a_0001.png,0\nb_0002.png,1", "1 images of .* without a label: c_0000.png"),
        ("a_0001.png,0\nb_0002.png,1\nc_0000.png,2\nd.png,0", "1 files that are not in .*: d.png"),
        ("a_0001.png,0\na_0001.png,1\nb_0002.png,1\nc_0000.png,2", "1 files listed twice: a_0001.png"),
        ("a_0001.png,0\nb_0002.png,3\nc_0000.png,2", r"b_0002.png: label '3' is out of range; use 0\.\.2"),
        ("a_0001.png,-1\nb_0002.png,1\nc_0000.png,2", "label '-1' is out of range"),
        ("a_0001.png\nb_0002.png,1\nc_0000.png,2", "line 1 is 'a_0001.png'; file,class is needed"),
    ],
)
def test_lists_that_do_not_fit_are_refused(flat, tmp_path, text, message):
    (tmp_path / "l.csv").write_text(text)
    with pytest.raises(QexpError, match=message):
        by_list(Source(flat), tmp_path / "l.csv", PETS)


def test_a_file_name_tells_its_class(flat):
    assert by_name(Source(flat), r"_(\d+)\.", PETS).labels == (1, 2, 0)
    for pattern, message in (
        (r"_(\d{5})", "3 images not matched"),
        (r"_\d+", "0 groups; one is needed"),
        ("(", "not a regular"),
    ):
        with pytest.raises(QexpError, match=message):
            by_name(Source(flat), pattern, PETS)
    with pytest.raises(QexpError, match="label '0002' is out of range"):
        by_name(Source(flat), r"_(\d+)\.", Classes(("x", "y"), ("x", "y")))


@pytest.mark.parametrize(
    ("text", "ids", "names"),
    [
        ("traffic light\ncat\n", ("traffic light", "cat"), ("traffic light", "cat")),
        ("n1,cat\nn2,dog\n", ("n1", "n2"), ("cat", "dog")),
        ("index,wnid,name\n0,n1,cat\n1,n2,dog\n", ("n1", "n2"), ("cat", "dog")),
        (
            "n01440764 tench, Tinca tinca\nn01443537 goldfish\n",
            ("n01440764", "n01443537"),
            ("tench, Tinca tinca", "goldfish"),
        ),
    ],
)
def test_lists_of_classes_come_in_several_forms(tmp_path, text, ids, names):
    (tmp_path / "c").write_text(text)
    assert read_classes(tmp_path / "c") == Classes(ids, names)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("0,a,x\n2,b,y\n", "class 1 is numbered 2; the indices must count"),
        ("a\nb\na\n", "class 'a' occurs twice"),
        ("", "no classes in it"),
    ],
)
def test_lists_of_classes_that_cannot_be_meant_are_refused(tmp_path, text, message):
    (tmp_path / "c").write_text(text)
    with pytest.raises(QexpError, match=message):
        read_classes(tmp_path / "c")
    with pytest.raises(QexpError, match="cannot be read"):
        read_classes(tmp_path / "gone")


def test_a_name_that_two_classes_share_is_no_label():
    cranes = Classes(("n02012849", "n03126707"), ("crane", "crane"))
    assert cranes.index("n03126707", "here") == 1
    with pytest.raises(QexpError, match="here: label 'crane'"):
        cranes.index("crane", "here")


def test_greymaps_and_gifs_are_images_and_other_files_are_named(tmp_path, caplog):
    for name in ("a/1.pgm", "a/2.GIF", "b/3.jpe", "b/4.heic", "b/notes.txt", "a/5.npy"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    listing, _ = by_folder(Source(tmp_path), None)
    assert listing.names == ("a/1.pgm", "a/2.GIF", "b/3.jpe")
    assert "2 files are skipped" in caplog.text and "a/5.npy, b/4.heic" in caplog.text
