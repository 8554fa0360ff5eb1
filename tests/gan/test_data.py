from __future__ import annotations

import json
from importlib import resources

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from gan.data import SPLITS, PairedImages, augment, batches, embedded_pairs, to_float, to_uint8
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
    with (FOLDER / "noto.png").open("rb") as noto, (FOLDER / "edges.png").open("rb") as edges:
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
