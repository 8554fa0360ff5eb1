from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from gan import folders
from gan.errors import UserError
from gan.folders import Preprocess, Reading, as_tensor, load_pairs, load_unpaired, open_image

SMALL = Reading(preprocess=Preprocess(load_size=8, crop_size=8))


def picture(seed: int, size: tuple[int, int] = (8, 8)) -> Image.Image:
    """Random pixels; width and height as in Pillow."""
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def side_by_side(first: Image.Image, second: Image.Image) -> Image.Image:
    both = Image.new("RGB", (first.width + second.width, first.height))
    both.paste(first, (0, 0))
    both.paste(second, (first.width, 0))
    return both


def save(image: Image.Image, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path)


@pytest.fixture
def aligned(tmp_path: Path) -> Path:
    """40 / 12 / 10 pairs; A is picture n, B picture 1000 + n."""
    folder = tmp_path / "shapes"
    for split, first, count in (("train", 0, 40), ("val", 100, 12), ("test", 200, 10)):
        for n in range(first, first + count):
            save(side_by_side(picture(n), picture(1000 + n)), folder / split / f"{n:03}.png")
    return folder


@pytest.fixture
def unaligned(tmp_path: Path) -> Path:
    """40 train images of each domain, of which 30 share their names, and 10 test images, which all do."""
    folder = tmp_path / "horses"
    for side, seed, first in (("A", 0, 0), ("B", 1000, 10)):
        for split, numbers in (("train", range(first, first + 40)), ("test", range(10))):
            for n in numbers:
                save(picture(seed + n), folder / f"{split}{side}" / f"{n:03}.png")
    return folder


def test_pairs_side_by_side(aligned):
    train, val, test, notes = load_pairs(aligned, SMALL)
    assert [len(split) for split in (train, val, test)] == [40, 12, 10]
    assert notes == ()
    assert train.names[3] == "003"
    assert train.inputs.dtype == torch.uint8
    assert torch.equal(train.inputs[3], as_tensor(picture(3), 3))
    assert torch.equal(val.targets[5], as_tensor(picture(1105), 3))


def test_the_direction_swaps_input_and_target(aligned):
    forth, back = (
        load_pairs(aligned, Reading(direction, SMALL.preprocess)).val for direction in ("AtoB", "BtoA")
    )
    assert torch.equal(forth.inputs, back.targets)
    assert torch.equal(forth.targets, back.inputs)


def test_pairs_by_name_and_what_has_no_partner(unaligned):
    with pytest.raises(UserError, match=r"20 images of .* \(no partner\) and 12 more; .* --odd-images skip"):
        load_pairs(unaligned, SMALL)
    train, val, test, notes = load_pairs(unaligned, Reading("BtoA", SMALL.preprocess, "skip"))
    assert len(train) + len(val) == 30
    assert len(test) == 10
    assert "trainA/000 (no partner)" in notes[0]
    assert torch.equal(test.inputs[4], as_tensor(picture(1004), 3))
    assert torch.equal(test.targets[4], as_tensor(picture(4), 3))


def test_unpaired_domains(unaligned):
    train, val, test, notes = load_unpaired(unaligned, Reading("BtoA", SMALL.preprocess))
    assert len(test.first) == len(test.second) == 10
    assert torch.equal(test.first[2], as_tensor(picture(1002), 3))  # B comes first
    assert (len(train.first) + len(val.first), len(train.second) + len(val.second)) == (40, 40)
    assert len(notes) == 2
    assert "has no val split" in notes[0]


def test_a_missing_val_split_is_a_fixed_share_of_train(aligned):
    for path in (aligned / "val").iterdir():
        path.unlink()
    (aligned / "val").rmdir()
    train, val, test, notes = load_pairs(aligned, SMALL)
    assert len(val) == 13  # 16, but at most a third
    assert len(test) == 10
    assert sorted([*train.names, *val.names]) == [f"{n:03}" for n in range(40)]
    assert "no val split: 13 train images stand in for it" in notes[0]
    assert val.names != train.names[:13]
    save(side_by_side(picture(40), picture(1040)), aligned / "train" / "999.png")
    load_pairs.cache_clear()
    more = load_pairs(aligned, SMALL).val  # a new image hardly moves the others
    assert len(set(val.names) & set(more.names)) >= 12


def test_without_a_test_split_val_is_shared(aligned):
    for n in range(112, 124):
        save(side_by_side(picture(n), picture(1000 + n)), aligned / "val" / f"{n:03}.png")
    for path in (aligned / "test").iterdir():
        path.unlink()
    train, val, test, notes = load_pairs(aligned, SMALL)
    assert [len(split) for split in (train, val, test)] == [40, 12, 12]
    assert not set(val.names) & set(test.names)
    assert "12 of the 24 val images are for the final figures" in notes[0]


def test_limits_are_spread_evenly(aligned):
    found = load_pairs(aligned, Reading(preprocess=SMALL.preprocess, train=10, val=9))
    assert found.train.names == tuple(f"{n:03}" for n in (0, 4, 9, 13, 17, 22, 26, 30, 35, 39))
    assert len(found.val) == 9


@pytest.mark.parametrize(
    ("kind", "size", "wanted"),
    [
        ("resize_and_crop", (60, 40), (16, 16)),
        ("crop", (60, 40), (16, 16)),
        ("scale_width", (60, 40), (20, 16)),  # at least the crop high
        ("scale_width", (60, 90), (20, 30)),
        ("scale_width_and_crop", (60, 90), (16, 16)),
        ("none", (61, 42), (60, 40)),  # 42 / 4 is rounded to the even 10
    ],
)
def test_sizes_of_the_kinds_of_preprocessing(kind, size, wanted):
    assert Preprocess(kind, 20, 16)(picture(0, size)).size == wanted


def test_crops():
    image = picture(0, (20, 12))
    corner, middle = (Preprocess("crop", 8, 8)(image, place) for place in ((0.0, 1.0), (0.5, 0.5)))
    assert np.array_equal(np.asarray(corner), np.asarray(image)[4:12, :8])
    assert np.array_equal(np.asarray(middle), np.asarray(image)[2:10, 6:14])
    with pytest.raises(ValueError, match="20 × 12 pixels are less than the crop of 16"):
        Preprocess("crop", 16, 16)(image)


def test_training_crops_differ_by_name_and_never_change(tmp_path):
    for split in ("train", "val", "test"):
        for n in range(9):
            save(side_by_side(picture(7, (32, 32)), picture(8, (32, 32))), tmp_path / split / f"{n}.png")
    reading = Reading(preprocess=Preprocess("crop", 8, 8))
    train, val, _, _ = load_pairs(tmp_path, reading)
    assert len({tuple(image.flatten().tolist()) for image in train.inputs}) > 5
    assert torch.equal(val.inputs[0], val.inputs[8])
    assert torch.equal(val.inputs[0], as_tensor(picture(7, (32, 32)), 3)[:, 12:20, 12:20])
    load_pairs.cache_clear()
    assert torch.equal(load_pairs(tmp_path, reading).train.inputs, train.inputs)
    white = torch.isin(train.inputs[2], as_tensor(picture(7, (32, 32)), 3))
    assert bool(white.all())


def test_outside_the_training_images_are_resized_to_the_crop(tmp_path):
    for split in ("train", "val", "test"):
        for n in range(9):
            save(side_by_side(picture(n, (16, 16)), picture(n, (16, 16))), tmp_path / split / f"{n}.png")
    found = load_pairs(tmp_path, Reading(preprocess=Preprocess("resize_and_crop", 12, 8)))
    resized = picture(4, (16, 16)).resize((8, 8), Image.Resampling.BICUBIC)
    assert torch.equal(found.val.inputs[4], as_tensor(resized, 3))
    assert not torch.equal(found.train.inputs[4], found.val.inputs[4])


def test_grey_inputs(aligned):
    found = load_pairs(aligned, Reading(preprocess=SMALL.preprocess, channels=(1, 3)))
    assert found.val.inputs.shape == (12, 1, 8, 8)
    assert found.val.targets.shape == (12, 3, 8, 8)
    r, g, b = as_tensor(picture(100), 3).double()
    luminance = 0.299 * r + 0.587 * g + 0.114 * b
    assert float((found.val.inputs[0, 0] - luminance).abs().max()) <= 1


def test_kinds_of_files(tmp_path):
    levels = np.full((2, 3), 0x80FF, np.uint16)
    Image.fromarray(levels).save(tmp_path / "deep.png")
    assert set(np.asarray(open_image(tmp_path / "deep.png")).flatten().tolist()) == {0x80}
    Image.new("RGBA", (2, 2), (0, 0, 0, 0)).save(tmp_path / "clear.png")
    assert set(np.asarray(open_image(tmp_path / "clear.png")).flatten().tolist()) == {255}
    Image.new("L", (2, 2), 9).save(tmp_path / "grey.png")
    assert open_image(tmp_path / "grey.png").mode == "RGB"
    (tmp_path / "text.png").write_text("no image")
    with pytest.raises(UserError, match=r"text\.png cannot be read as an image"):
        open_image(tmp_path / "text.png")


@pytest.mark.parametrize("kind", [np.int32, np.float32])
def test_levels_without_a_range_are_refused(tmp_path, kind):
    """Pillow would make them all white, or all black."""
    Image.fromarray(np.full((2, 3), 7, kind)).save(tmp_path / "deep.tif")
    with pytest.raises(
        UserError, match=r"deep\.tif cannot be read .*nothing says what is white.* save it again"
    ):
        open_image(tmp_path / "deep.tif")


def test_two_files_of_one_name_are_refused(aligned):
    save(picture(0), aligned / "train" / "003.jpg")
    with pytest.raises(
        UserError, match=r"train has 003\.jpg and 003\.png, which differ in their endings alone"
    ):
        load_pairs(aligned, SMALL)


def test_odd_images_are_named(aligned):
    (aligned / "train" / "broken.jpg").write_bytes(b"\xff\xd8\xff")
    save(picture(0, (9, 8)), aligned / "train" / "odd.png")
    with pytest.raises(
        UserError, match=r"2 images of .* \(train\) cannot be used: broken \(.*odd \(9 × 8 pixels"
    ):
        load_pairs(aligned, SMALL)
    found = load_pairs(aligned, Reading(preprocess=SMALL.preprocess, odd_images="skip"))
    assert len(found.train) == 40
    assert "2 images of" in found.notes[0]
    assert "are left out: broken" in found.notes[0]


def test_images_of_another_size_are_odd(aligned):
    save(side_by_side(picture(0, (12, 8)), picture(0, (12, 8))), aligned / "val" / "wide.png")
    with pytest.raises(UserError, match="wide \\(12 × 8 pixels where others have 8 × 8\\)"):
        load_pairs(aligned, Reading(preprocess=Preprocess("none", 8, 8)))


def test_layouts_that_are_none(tmp_path, aligned, unaligned):
    with pytest.raises(UserError, match="does not exist; name one with --data"):
        load_pairs(tmp_path / "nowhere", SMALL)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no images in a known layout; it needs train/"):
        load_pairs(tmp_path / "empty", SMALL)
    (tmp_path / "empty" / "train").mkdir()
    with pytest.raises(UserError, match="has no images in train; allowed are"):
        load_pairs(tmp_path / "empty", SMALL)
    (tmp_path / "one" / "trainB").mkdir(parents=True)
    for load in (load_pairs, load_unpaired):
        with pytest.raises(UserError, match="has trainB but no trainA; both domains are needed"):
            load(tmp_path / "one", SMALL)
    save(picture(0), tmp_path / "one" / "trainB" / "0.png")
    (tmp_path / "one" / "trainA").mkdir()
    with pytest.raises(UserError, match=r"trainA has no images, but trainB has 1; both domains are needed"):
        load_pairs(tmp_path / "one", SMALL)
    with pytest.raises(UserError, match="holds pairs; unpaired work needs"):
        load_unpaired(aligned, SMALL)
    (unaligned / "train").mkdir()
    with pytest.raises(UserError, match="has both train and trainA"):
        load_pairs(unaligned, SMALL)


def test_domains_without_a_common_name(tmp_path):
    for n in range(9):
        save(picture(n), tmp_path / "trainA" / f"a{n}.png")
        save(picture(n), tmp_path / "trainB" / f"b{n}.png")
    with pytest.raises(
        UserError, match=r"no image of .*trainA \(9\) has one of the same name in trainB \(9\)"
    ):
        load_pairs(tmp_path, SMALL)


def test_too_few_and_too_many(tmp_path, aligned):
    for n in range(12):
        save(side_by_side(picture(n), picture(n)), tmp_path / "few" / "train" / f"{n}.png")
    with pytest.raises(UserError, match=r"\(train\) has 6 usable images; at least 9 are needed"):
        load_pairs(tmp_path / "few", SMALL)
    for n in range(12, 30):
        save(side_by_side(picture(n), picture(n)), tmp_path / "few" / "train" / f"{n}.png")
    load_pairs.cache_clear()
    with pytest.raises(UserError, match=r"\(test, taken from another split\) has 6 usable images"):
        load_pairs(tmp_path / "few", SMALL)
    tiny = Reading(preprocess=SMALL.preprocess, memory_gb=2e-5)
    with pytest.raises(UserError, match=r"take 0\.0 GB of memory, more than --memory-gb 2e-05; use fewer"):
        load_pairs(aligned, tiny)


@pytest.mark.parametrize(
    ("reading", "sentence"),
    [
        (Reading("AtoC"), "unknown direction 'AtoC'; known are AtoB, BtoA"),  # type: ignore[arg-type]
        (Reading(preprocess=Preprocess("squash")), "unknown preprocessing 'squash'"),  # type: ignore[arg-type]
        (Reading(preprocess=Preprocess(load_size=8, crop_size=9)), "--load-size is 8, below --crop-size 9"),
        (Reading(preprocess=Preprocess("crop", 8, 0)), "--crop-size is 0"),
        (Reading(odd_images="keep"), "unknown way with odd images 'keep'"),  # type: ignore[arg-type]
        (Reading(val=-1), "--val-images is -1"),
        (Reading(channels=(4, 3)), "take 4 → 3 channels; images have 3, or 1"),
        (Reading(memory_gb=0), "--memory-gb is 0"),
    ],
)
def test_options_that_no_folder_can_be_read_with(tmp_path, reading, sentence):
    with pytest.raises(UserError, match=sentence):
        load_pairs(tmp_path, reading)


def test_hidden_and_nested_files(aligned):
    save(picture(0), aligned / "train" / "._000.png")
    save(side_by_side(picture(1), picture(2)), aligned / "train" / "more" / "000.png")
    assert "more/000" in load_pairs(aligned, SMALL).train.names
    assert len(folders.find_images(aligned / "train")) == 41
