from __future__ import annotations

import json
from importlib import resources

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from gan.data import (
    SPLITS,
    PairedImages,
    UnpairedImages,
    augment,
    augment_alone,
    batches,
    embedded_pairs,
    embedded_unpaired,
    framed,
    to_float,
    to_uint8,
    unpaired_batches,
)
from gan.errors import UserError
from tests.gan.conftest import random, tiny_pairs

FOLDER = resources.files("gan") / "assets" / "emoji64"
INDEX = json.loads((FOLDER / "index.json").read_text())


@pytest.mark.parametrize(("split", "count"), [("train", 1084), ("val", 160), ("test", 256)])
def test_sizes_of_the_splits(split, count):
    pairs = embedded_pairs("edges2emoji", split)
    assert len(pairs) == len(pairs.names) == count
    assert pairs.inputs.shape == pairs.targets.shape == (count, 3, 64, 64)
    assert pairs.inputs.dtype == pairs.targets.dtype == torch.uint8


def test_no_family_is_in_two_splits():
    families = [{item["family"] for item in INDEX["items"] if item["split"] == split} for split in SPLITS]
    assert all(families)
    assert sum(map(len, families)) == len(set.union(*families))


def test_val_images_are_unseen_and_so_are_test_images_but_one():
    """Noto draws one family by three names."""
    train, val, test = (embedded_pairs("edges2emoji", split) for split in SPLITS)
    drawings = [{image.numpy().tobytes() for image in pairs.targets} for pairs in (train, val, test)]
    assert not drawings[1] & (drawings[0] | drawings[2])
    known = [
        name
        for name, image in zip(test.names, test.targets, strict=True)
        if image.numpy().tobytes() in drawings[0]
    ]
    assert known == ["family"]


def test_tiles_are_cut_row_by_row():
    with (FOLDER / "noto.webp").open("rb") as noto, (FOLDER / "edges.png").open("rb") as edges:
        sheets = [np.asarray(Image.open(file).convert("RGB")) for file in (edges, noto)]
    pairs = embedded_pairs("edges2emoji", "val")
    places = [i for i, item in enumerate(INDEX["items"]) if item["split"] == "val"]
    for row in (0, 77, 159):
        top, left = 64 * (places[row] // 40), 64 * (places[row] % 40)
        for sheet, images in zip(sheets, (pairs.inputs, pairs.targets), strict=True):
            wanted = sheet[top : top + 64, left : left + 64].transpose(2, 0, 1)
            assert np.array_equal(images[row].numpy(), wanted)
        assert pairs.names[row] == INDEX["items"][places[row]]["name"]


def test_edges_lie_on_the_edges_of_their_drawing():
    pairs = embedded_pairs("edges2emoji", "val")
    grey = pairs.targets.float().mean(1)
    slope = F.pad(grey.diff(dim=1).abs(), (0, 0, 0, 1)) + F.pad(grey.diff(dim=2).abs(), (0, 1))
    black = (pairs.inputs[:, 0] == 0).float()

    def slope_at_edges(black: Tensor) -> Tensor:
        return (slope * black).sum((1, 2)) / black.sum((1, 2)).clamp_min(1)

    assert torch.equal(pairs.inputs[:, 0], pairs.inputs[:, 1])
    assert sorted(pairs.inputs.unique().tolist()) == [0, 255]
    own, others = slope_at_edges(black), slope_at_edges(black.roll(1, 0))
    assert float((own > others).float().mean()) > 0.95


def test_unknown_tasks_and_splits_are_refused():
    with pytest.raises(
        UserError, match=r"unknown embedded task 'edges2emojis'; .* did you mean 'edges2emoji'"
    ):
        embedded_pairs("edges2emojis", "val")
    with pytest.raises(UserError, match="unknown split 'valid'; known are test, train, val"):
        embedded_pairs("edges2emoji", "valid")  # type: ignore[arg-type]


def test_every_8_bit_value_survives_the_way_there_and_back():
    values = torch.arange(256).to(torch.uint8)
    assert torch.equal(to_uint8(to_float(values)), values)
    assert to_float(values).dtype == torch.float32
    assert to_float(values)[[0, 255]].tolist() == [-1.0, 1.0]
    assert to_uint8(torch.tensor([-3.0, 3.0, 0.0])).tolist() == [0, 255, 128]


def test_flips_double_the_set():
    pairs = tiny_pairs(3)
    both = pairs.with_flips()
    assert len(both) == 6
    for name in ("inputs", "targets"):
        images, doubled = getattr(pairs, name), getattr(both, name)
        assert torch.equal(doubled[:3], images)
        assert torch.equal(doubled[3:], images.flip(-1))
    assert both.names == ("0-0", "0-1", "0-2", "0-0 (mirrored)", "0-1 (mirrored)", "0-2 (mirrored)")


def test_take_spreads_over_the_set():
    pairs = tiny_pairs(9)
    taken = pairs.take(5)
    assert taken.names == ("0-0", "0-2", "0-4", "0-6", "0-8")
    assert torch.equal(taken.inputs, pairs.inputs[::2])
    assert torch.equal(taken.targets, pairs.targets[::2])
    assert pairs.take(9) is pairs
    assert pairs.take(100) is pairs
    assert all(len(set(pairs.take(count).names)) == count for count in range(1, 9))


def test_tensors_are_floats_of_both():
    pairs = tiny_pairs(2)
    inputs, targets = pairs.tensors()
    assert torch.equal(inputs, to_float(pairs.inputs))
    assert torch.equal(targets, to_float(pairs.targets))


def candidates(image: Tensor, shift: int) -> list[Tensor]:
    """Everything that an image may become, edges repeated."""
    padded = F.pad(image[None].float(), (shift,) * 4, mode="replicate")[0].to(torch.uint8)
    size = image.shape[-1]
    moves = [(y, x) for y in range(2 * shift + 1) for x in range(2 * shift + 1)]
    crops = [padded[:, y : y + size, x : x + size] for y, x in moves]
    return [*crops, *[crop.flip(-1) for crop in crops]]


def test_augmentation_mirrors_and_moves_both_of_a_pair_alike():
    images = torch.randint(0, 256, (64, 3, 8, 8), generator=random(), dtype=torch.uint8)
    inputs, targets = augment(images, 255 - images, shift=1, generator=random(1))
    assert torch.equal(targets, 255 - inputs)
    seen = set()
    for image, moved in zip(images, inputs, strict=True):
        which = [i for i, wanted in enumerate(candidates(image, 1)) if torch.equal(moved, wanted)]
        assert len(which) == 1
        seen.add(which[0])
    assert len(seen) > 12  # of 18: both mirrored and not, all directions


def test_without_a_shift_images_are_only_mirrored():
    images = torch.randint(0, 256, (32, 3, 8, 8), generator=random(), dtype=torch.uint8)
    inputs, _ = augment(images, images, shift=0, generator=random(1))
    mirrored = [torch.equal(made, image.flip(-1)) for made, image in zip(inputs, images, strict=True)]
    kept = [torch.equal(made, image) for made, image in zip(inputs, images, strict=True)]
    assert sum(mirrored) + sum(kept) == 32
    assert 4 < sum(mirrored) < 28


def numbered(count: int) -> PairedImages:
    """The value of every pixel is the row."""
    images = torch.arange(count, dtype=torch.uint8)[:, None, None, None].expand(count, 3, 8, 8).contiguous()
    return PairedImages(images, images + 100, tuple(map(str, range(count))))


def test_an_epoch_shows_every_row_once_in_full_batches():
    pairs = numbered(11)
    found = list(batches(pairs, 4, random()))
    assert [len(rows) for _, _, rows in found] == [4, 4]
    shown = torch.cat([rows for *_, rows in found]).tolist()
    assert len(set(shown)) == 8
    assert shown != sorted(shown)
    for inputs, targets, rows in found:
        assert torch.equal(to_uint8(inputs)[:, 0, 0, 0].long(), rows)
        assert torch.equal(to_uint8(targets)[:, 0, 0, 0].long(), rows + 100)


def test_a_batch_is_never_larger_than_the_set():
    ((inputs, _, rows),) = batches(numbered(3), 16, random())
    assert len(inputs) == 3
    assert sorted(rows.tolist()) == [0, 1, 2]


def test_batches_are_augmented_unless_told_otherwise():
    pairs = tiny_pairs(12)
    plain = {float(x.sum()) for x, *_ in batches(pairs, 1, random(), shift=2, augmented=False)}
    assert plain == {float(image.sum()) for image in to_float(pairs.inputs)}
    for inputs, _, rows in batches(pairs, 12, random(), shift=2):
        assert not torch.equal(to_uint8(inputs), pairs.inputs[rows])


def test_batches_depend_on_their_generator_alone():
    first, again, other = (
        torch.cat([inputs for inputs, *_ in batches(tiny_pairs(8), 4, random(seed), shift=2)])
        for seed in (0, 0, 1)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_noto_and_twemoji_are_the_same_emoji_in_two_drawings():
    edges, drawings = (embedded_pairs(task, "test") for task in ("edges2emoji", "noto2twemoji"))
    assert torch.equal(framed(edges.targets), drawings.inputs)
    assert edges.names == drawings.names
    inputs, targets = drawings.tensors()
    own, others = ((inputs - targets.roll(by, 0)).abs().mean() for by in (0, 1))
    assert float(own) < 0.7 * float(others)


def test_drawings_are_framed_alike():
    """No domain is told by how much of its tiles it fills."""
    for images in embedded_pairs("noto2twemoji", "val").tensors():
        drawn = (images < 0.9).any(1)
        reach = torch.stack([drawn.any(axis).sum(1) for axis in (1, 2)]).amax(0)
        assert int(reach.max()) <= 60
        assert float((reach >= 58).float().mean()) > 0.95
        assert not drawn[:, :2].any()
        assert not drawn[:, :, -2:].any()


def test_framing_by_hand():
    image = torch.full((2, 3, 64, 64), 255, dtype=torch.uint8)
    image[0, :, 1:21, 30:40] = 7
    wide, empty = framed(image, 60)
    assert torch.equal(empty, image[1])
    assert (wide == 7).all(0).sum() == 60 * 30
    assert (wide[:, 2:62, 17:47] == 7).all()


@pytest.mark.parametrize("split", SPLITS)
def test_without_their_pairing_no_drawing_stands_beside_its_counterpart(split):
    pairs, images = embedded_pairs("noto2twemoji", split), embedded_unpaired("noto2twemoji", split)
    assert torch.equal(images.first, pairs.inputs)
    assert images.first_names == pairs.names
    assert sorted(images.second_names) == sorted(pairs.names)
    assert all(a != b for a, b in zip(images.first_names, images.second_names, strict=True))
    places = [pairs.names.index(name) for name in images.second_names]
    assert torch.equal(images.second, pairs.targets[places])


def unpaired(first: int, second: int) -> UnpairedImages:
    """The value of every pixel is the row, plus 100 in the second domain."""
    a, b = numbered(first), numbered(second)
    return UnpairedImages(a.inputs, b.targets, a.names, b.names)


def test_unpaired_images_take_and_swap_each_domain():
    images = unpaired(9, 4)
    assert len(images) == len(images.swapped()) == 9
    assert images.take(5).first_names == ("0", "2", "4", "6", "8")
    assert images.take(5).second_names == ("0", "1", "2", "3")
    assert torch.equal(images.take(None).second, images.second)
    back = images.swapped()
    assert torch.equal(back.first, images.second)
    assert back.second_names == images.first_names
    first, second = images.tensors()
    assert torch.equal(first, to_float(images.first))
    assert torch.equal(second, to_float(images.second))


def test_unpaired_batches_show_the_larger_domain_once_and_the_smaller_one_evenly():
    shown: tuple[list[int], list[int]] = ([], [])
    for batch in unpaired_batches(unpaired(12, 5), 4, random()):
        for images, seen in zip(batch, shown, strict=True):
            assert images.shape == (4, 3, 8, 8)
            seen += to_uint8(images)[:, 0, 0, 0].tolist()
    assert sorted(shown[0]) == list(range(12))
    assert sorted(shown[1][:5]) == sorted(shown[1][5:10]) == list(range(100, 105))
    assert [value - 100 for value in shown[1]] != shown[0]


def test_unpaired_images_are_augmented_apart():
    images = torch.randint(0, 256, (64, 3, 8, 8), generator=random(), dtype=torch.uint8)
    moved = augment_alone(images, 1, random(1))
    assert torch.equal(moved, augment(images, images, 1, random(1))[0])
    names = ("",) * 64
    same = UnpairedImages(images, images, names, names)
    batches_seen = list(unpaired_batches(same, 64, random(), shift=1))
    (first, second) = batches_seen[0]
    assert not torch.equal(first.sort(0).values, second.sort(0).values)


def test_grey_images_are_augmented_too():
    inputs = torch.arange(64, dtype=torch.uint8).reshape(1, 1, 8, 8)
    grey, colour = augment(inputs, inputs.expand(1, 3, 8, 8), 1, random())
    assert grey.shape == (1, 1, 8, 8)
    assert torch.equal(colour, grey.expand(1, 3, 8, 8))


def test_drawn_pairs_hold_all_of_both_domains():
    pairs = unpaired(5, 3).drawn()
    assert pairs.inputs[:, 0, 0, 0].tolist() == [0, 1, 2, 3, 4]
    assert pairs.targets[:, 0, 0, 0].tolist() == [100, 101, 102, 100, 101]
    assert pairs.names == ("0", "1", "2", "3", "4")
    back = pairs.swapped()
    assert torch.equal(back.inputs, pairs.targets)
    domains = UnpairedImages.of(back)
    assert torch.equal(domains.first, pairs.targets)
    assert torch.equal(domains.second, pairs.inputs)
