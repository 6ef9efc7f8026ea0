"""The in-memory loader: every image once, the same batches for the same (seed, epoch), augmentation that only moves."""

from itertools import chain

import pytest
import torch
from torchvision.transforms import functional as tv

from qexp.data.tensors import Augment, Normalize, TensorLoader
from qexp.errors import QexpError

RAW = Normalize((0.0,), (1.0,), max_value=1.0)


def loader(n=50, batch_size=8, **options) -> TensorLoader:
    images = torch.arange(n, dtype=torch.uint8).view(n, 1, 1, 1).expand(n, 1, 6, 6).contiguous()
    return TensorLoader(images, torch.arange(n), batch_size, options.pop("normalize", RAW), **options)


def batches(source: TensorLoader) -> list[tuple[torch.Tensor, torch.Tensor]]:
    return list(source)


def same(a, b) -> bool:
    return all(torch.equal(x, u) and torch.equal(y, v) for (x, y), (u, v) in zip(a, b, strict=True))


def test_without_shuffle_every_image_comes_once_in_order_with_its_label():
    out = batches(loader())
    assert len(out) == len(loader()) == 7
    assert torch.cat([y for _, y in out]).tolist() == list(range(50))
    assert all(torch.equal(x[:, 0, 0, 0], y.float()) for x, y in out)


def test_shuffle_is_a_permutation_and_images_keep_their_labels():
    out = batches(loader(shuffle=True))
    order = torch.cat([y for _, y in out])
    assert sorted(order.tolist()) == list(range(50)) != order.tolist()
    assert all(torch.equal(x[:, 0, 3, 3], y.float()) for x, y in out)


def test_an_epoch_follows_from_seed_and_epoch_alone():
    options = {"shuffle": True, "augment": Augment(2, True), "seed": 4}
    through, resumed = loader(**options), loader(**options)
    epochs = []
    for epoch in range(3):
        through.sampler.set_epoch(epoch)
        epochs.append(batches(through))
    resumed.sampler.set_epoch(2)
    assert same(batches(resumed), epochs[2])
    assert not same(epochs[0], epochs[1])
    assert not same(batches(loader(**{**options, "seed": 5})), epochs[0])


def test_batch_size_does_not_change_what_happens_to_an_image():
    def images(size):
        return torch.cat([x for x, _ in loader(batch_size=size, shuffle=True, augment=Augment(2, True))])

    assert torch.equal(images(8), images(13))


def test_drop_last_leaves_only_full_batches():
    cut = loader(drop_last=True)
    assert len(cut) == len(batches(cut)) == 6
    assert {len(y) for _, y in cut} == {8}


def test_indices_choose_the_part():
    assert torch.cat([y for _, y in loader(indices=[3, 1, 4])]).tolist() == [3, 1, 4]


def test_normalisation_equals_torchvision():
    image = torch.randint(0, 256, (4, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    assert torch.equal(Normalize(mean, std)(image), tv.normalize(image.float() / 255, list(mean), list(std)))


def test_resize_gives_the_asked_side_and_keeps_a_constant():
    out = Normalize((0.0,), (1.0,), size=24)(torch.full((2, 1, 8, 8), 51, dtype=torch.uint8))
    assert out.shape == (2, 1, 24, 24)
    torch.testing.assert_close(out, torch.full_like(out, 0.2))


def test_crop_takes_the_window_that_the_shift_names():
    image = torch.arange(1, 26, dtype=torch.uint8).view(1, 1, 5, 5)
    centre, corner = torch.tensor([[2, 2]]), torch.tensor([[0, 4]])
    kept = torch.tensor([False])
    assert torch.equal(Augment(padding=2)(image, centre, kept), image)
    moved = Augment(padding=2)(image, corner, kept)[0, 0]
    assert torch.equal(moved[2:, :3], image[0, 0, :3, 2:])
    assert (moved[:2] == 0).all() and (moved[:, 3:] == 0).all()


def test_flip_mirrors_the_chosen_images_only():
    images = torch.arange(50, dtype=torch.uint8).view(2, 1, 5, 5)
    out = Augment(flip=True)(images, torch.zeros(2, 2, dtype=torch.int64), torch.tensor([True, False]))
    assert torch.equal(out[0], images[0].flip(-1)) and torch.equal(out[1], images[1])


def test_augmentation_uses_every_shift_and_flips_half():
    pixels = torch.zeros(4000, 1, 5, 5, dtype=torch.uint8)
    pixels[:, :, 2, 1] = 1
    source = TensorLoader(pixels, torch.zeros(4000, dtype=torch.int64), 500, RAW, augment=Augment(1, True))
    column = torch.cat([x for x, _ in source]).sum((0, 1, 2))
    # column 1 moved by -1..1, or column 3 (mirrored) moved by -1..1
    torch.testing.assert_close(column / 4000, torch.tensor([1, 1, 2, 1, 1]) / 6, atol=0.03, rtol=0)


def test_channels_last_changes_the_layout_only():
    images = torch.randint(0, 256, (6, 3, 4, 4), dtype=torch.uint8)
    plain, last = (
        next(iter(TensorLoader(images, torch.zeros(6), 6, Normalize((0.5,) * 3, (0.2,) * 3), channels_last=flag)))[0]
        for flag in (False, True)
    )
    assert torch.equal(plain, last)
    assert last.is_contiguous(memory_format=torch.channels_last) and plain.is_contiguous()


@pytest.mark.parametrize("n", [50, 48, 3])
def test_ranks_share_the_images(monkeypatch, n):
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 4)

    def on_rank(rank, **options):
        monkeypatch.setattr(torch.distributed, "get_rank", lambda: rank)
        source = loader(n, **options)
        labels = [y for _, y in source]
        assert len(labels) == len(source)
        return torch.cat(labels).tolist() if labels else []

    exact = [on_rank(r) for r in range(4)]
    assert sorted(chain.from_iterable(exact)) == list(range(n))
    padded = [on_rank(r, shuffle=True) for r in range(4)]
    assert len({len(p) for p in padded}) == 1 and set(chain.from_iterable(padded)) == set(range(n))


def test_batch_size_below_one_is_refused():
    with pytest.raises(QexpError, match="batch_size=0"):
        loader(batch_size=0)
