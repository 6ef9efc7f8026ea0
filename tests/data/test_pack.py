"""Packing: what is read back is what was decoded; interrupted, cut short, damaged, full disk: taken up again or named."""

import errno
import json
import logging
import struct

import numpy as np
import pytest
import torch

from qexp.data import packing
from qexp.data.decode import Resize, Source, rgb
from qexp.data.listing import Listing
from qexp.data.pack import HEADER, Pack, PackWriter
from qexp.data.packing import packed
from qexp.errors import QexpError
from tests.data.pictures import picture

RESIZE = Resize(20, 16)
N = 25


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(packing, "CHUNK", 4)


@pytest.fixture
def listing(tmp_path) -> Listing:
    folder = tmp_path / "images"
    folder.mkdir()
    for i in range(N):
        (folder / f"{i:02}.png").write_bytes(picture(i))
    names = tuple(f"{i:02}.png" for i in range(N))
    return Listing(Source(folder), names, tuple(i % 3 for i in range(N)))


def expected(listing: Listing, skip=()) -> torch.Tensor:
    kept = [n for i, n in enumerate(listing.names) if i not in skip]
    return torch.from_numpy(np.stack([RESIZE(rgb(listing.source.read(n))[0]) for n in kept]))


def pack(listing, folder, **how) -> Pack:
    return packed(listing, RESIZE, folder, "set-test", **{"workers": 0, **how})


def test_a_pack_holds_the_decoded_images_in_order(listing, tmp_path):
    made = pack(listing, tmp_path / "packs")
    assert made.shape == (N, 3, 16, 16) and len(made) == N
    assert torch.equal(made[:], expected(listing))
    assert made.labels.tolist() == list(listing.labels)
    some = torch.tensor([7, 3, 3, 24])
    assert torch.equal(made[some], expected(listing)[some]) and made[[]].shape == (0, 3, 16, 16)
    assert sorted(p.suffix for p in (tmp_path / "packs").iterdir() if p.name != ".lock") == [".pack"]


def test_what_is_read_is_a_copy_of_its_own(listing, tmp_path):
    made = pack(listing, tmp_path)
    made[:2].zero_()
    assert torch.equal(made[:], expected(listing))


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*:DeprecationWarning")
def test_processes_change_nothing(listing, tmp_path):
    one, two = pack(listing, tmp_path / "1"), pack(listing, tmp_path / "2", workers=2)
    assert one.content == two.content and torch.equal(one[:], two[:])


def test_the_second_use_decodes_nothing(listing, tmp_path, monkeypatch):
    pack(listing, tmp_path)
    monkeypatch.setattr(packing, "rgb", lambda _: pytest.fail("decoded again"))
    assert len(pack(listing, tmp_path)) == N


def test_other_files_labels_or_sizes_are_another_pack(listing, tmp_path):
    names = {packing.pack_name(listing, RESIZE), packing.pack_name(listing, Resize(24, 16))}
    names.add(packing.pack_name(listing.take(range(N - 1)), RESIZE))
    names.add(packing.pack_name(Listing(listing.source, listing.names, (1, *listing.labels[1:])), RESIZE))
    (listing.source.path / "03.png").write_bytes(picture(99))
    names.add(packing.pack_name(listing, RESIZE))
    assert len(names) == 5


BAD = {2: b"", 5: picture(5, kind="JPEG")[:200], 6: picture(6, mode="I;16"), 24: b"text"}


def spoil(listing):
    for i, content in BAD.items():
        (listing.source.path / f"{i:02}.png").write_bytes(content)
    for i, mode in ((9, "L"), (10, "L"), (11, "RGBA")):
        (listing.source.path / f"{i:02}.png").write_bytes(picture(i, mode=mode))


def test_bad_images_are_left_out_counted_and_named(listing, tmp_path, caplog):
    spoil(listing)
    with caplog.at_level(logging.WARNING):
        made = pack(listing, tmp_path)
    assert len(made) == N - 4 and [name for name, _ in made.skipped] == [f"{i:02}.png" for i in BAD]
    assert torch.equal(made[:], expected(listing, skip=BAD))
    assert made.labels.tolist() == [label for i, label in enumerate(listing.labels) if i not in BAD]
    assert made.converted == {"L": 2, "RGBA": 1}
    assert "4 of 25 images cannot be decoded (02.png: empty file" in caplog.text


def test_bad_images_may_be_an_error_and_nothing_decodable_is_one(listing, tmp_path):
    spoil(listing)
    with pytest.raises(QexpError, match=r"02.png cannot be decoded: empty file"):
        pack(listing, tmp_path, bad_images="error")
    pack(listing, tmp_path)
    with pytest.raises(QexpError, match="4 of 25 images cannot be decoded"):
        pack(listing, tmp_path, bad_images="error")
    with pytest.raises(QexpError, match="1 of 1 images cannot be decoded"):
        pack(listing.take([2]), tmp_path)
    with pytest.raises(QexpError, match="use skip or error"):
        pack(listing, tmp_path, bad_images="ignore")


def full_disk(monkeypatch, room: int):
    """A disk that takes `room` bytes of pixels, the last of them in a short write, and then no more."""
    real, left = PackWriter._write, [room]

    def write(self, content):
        taken = min(left[0], len(content))
        left[0] -= taken
        real(self, content[:taken])
        if taken < len(content):
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(PackWriter, "_write", write)


@pytest.mark.parametrize("room", [0, 3 * 768, 4 * 768, 10 * 768 + 5, 24 * 768, 25 * 768, 25 * 768 + 10])
def test_a_full_disk_loses_nothing_and_the_next_run_goes_on(listing, tmp_path, monkeypatch, room):
    with monkeypatch.context() as patch:
        full_disk(patch, room)
        with pytest.raises(QexpError, match=r"the disk is full; \d+ packed images are kept"):
            pack(listing, tmp_path)
    assert not list(tmp_path.glob("*.pack"))
    kept = min(room // (4 * 768) * 4, 24) if room < 25 * 768 else N
    decoded = []
    monkeypatch.setattr(packing, "rgb", lambda content: (decoded.append(1), rgb(content))[1])
    made = pack(listing, tmp_path)
    assert len(decoded) == N - kept and torch.equal(made[:], expected(listing))


def test_too_little_room_is_said_before_anything_is_decoded(listing, tmp_path, monkeypatch):
    monkeypatch.setattr(packing.shutil, "disk_usage", lambda _: type("", (), {"free": 1000})())
    monkeypatch.setattr(packing, "rgb", lambda _: pytest.fail("decoded"))
    with pytest.raises(QexpError, match=r"packing set-test needs .* GB are free"):
        pack(listing, tmp_path)


def interrupted(listing, tmp_path, monkeypatch, after: int):
    """A packing killed after so many images; returns the part file and the journal."""
    seen = []

    def killed(content):
        seen.append(1)
        if len(seen) > after:
            raise KeyboardInterrupt
        return rgb(content)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(packing, "rgb", killed)
        pack(listing, tmp_path)
    return next(tmp_path.glob("*.part")), next(tmp_path.glob("*.journal"))


@pytest.mark.parametrize("harm", ["nothing", "torn journal", "pixels lost", "pixels changed", "no part"])
def test_an_interrupted_packing_takes_up_what_is_whole(listing, tmp_path, monkeypatch, harm):
    part, journal = interrupted(listing, tmp_path, monkeypatch, after=14)
    assert part.stat().st_size == HEADER + 12 * 768
    if harm == "torn journal":
        journal.write_text(journal.read_text()[:-9])
    elif harm == "pixels lost":  # the journal reached the disk, the last pixels did not
        with part.open("r+b") as file:
            file.truncate(HEADER + 9 * 768)
    elif harm == "pixels changed":
        with part.open("r+b") as file:
            file.seek(HEADER + 5 * 768)
            file.write(b"\x00\x01\x02\x03\x04")
    elif harm == "no part":
        part.unlink()
    made = pack(listing, tmp_path)
    assert torch.equal(made[:], expected(listing)) and made.labels.tolist() == list(listing.labels)
    assert not list(tmp_path.glob("*.part")) and not list(tmp_path.glob("*.journal"))


@pytest.fixture
def made(listing, tmp_path) -> Pack:
    return pack(listing, tmp_path)


@pytest.mark.parametrize("size", [0, 7, HEADER - 1, HEADER, HEADER + 100, -1, 5])
def test_a_pack_cut_short_or_added_to_is_refused(made, size):
    content = made.path.read_bytes()
    made.path.write_bytes(content[:size] if size != 5 else content + b"extra")
    with pytest.raises(QexpError, match=r"cut short.*packed again"):
        Pack(made.path)


def test_a_pack_of_another_version_is_refused(made):
    content = bytearray(made.path.read_bytes())
    content[8:12] = struct.pack("<I", 7)
    made.path.write_bytes(content)
    with pytest.raises(QexpError, match="a pack of version 7, this qexp reads version 1; delete it"):
        Pack(made.path)


def test_changed_pixels_are_found_when_they_are_read_and_only_then(made):
    with made.path.open("r+b") as file:
        file.seek(HEADER + 9 * 768 + 3)
        file.write(bytes([255 - int(made[9:10].flatten()[3])]))
    again = Pack(made.path)
    assert len(again[:8]) == 8
    for chosen in (slice(8, 9), [11, 0], torch.tensor([9])):
        with pytest.raises(QexpError, match=r"images 8..11 have changed since they were packed"):
            Pack(made.path)[chosen]


@pytest.mark.parametrize("place", [HEADER - 4000, HEADER + 25 * 768 + 30])
def test_a_damaged_header_or_footer_is_named(made, place):
    with made.path.open("r+b") as file:
        file.seek(place)
        file.write(b"!!!")
    with pytest.raises(QexpError, match=r"damaged|cut short"):
        Pack(made.path)


def test_a_foreign_file_is_refused(tmp_path):
    (tmp_path / "x.pack").write_bytes(json.dumps({"a": 1}).encode() * 1000)
    with pytest.raises(QexpError, match="no pack file"):
        Pack(tmp_path / "x.pack")


def test_the_content_hash_follows_the_images_not_where_they_lie(listing, tmp_path):
    one = pack(listing, tmp_path / "a")
    moved = tmp_path / "elsewhere"
    listing.source.path.rename(moved)
    two = packed(Listing(Source(moved), listing.names, listing.labels), RESIZE, tmp_path / "b", "other", workers=0)
    assert one.content == two.content
    (moved / "00.png").write_bytes(picture(77))
    three = packed(Listing(Source(moved), listing.names, listing.labels), RESIZE, tmp_path / "b", "other", workers=0)
    assert three.content != one.content
