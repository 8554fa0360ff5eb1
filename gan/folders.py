"""Folders of images as pytorch-CycleGAN-and-pix2pix lays them out → tensors.

Aligned: ``train/ val/ test/`` with A|B side by side in every file. Unaligned: ``trainA trainB testA testB``
(``valA valB`` too, where they are); for paired work A and B are matched by file name.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Literal, NamedTuple, get_args

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from gan.data import SPLITS, PairedImages, Split, UnpairedImages
from gan.errors import UserError, unknown

Direction = Literal["AtoB", "BtoA"]
PreprocessKind = Literal["resize_and_crop", "crop", "scale_width", "scale_width_and_crop", "none"]
OddImages = Literal["refuse", "skip"]
SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".ppm", ".webp", ".gif", ".tif", ".tiff"})
SHARE, LEAST_SHARE = 0.1, 16
"""Of the training images that stand in for a missing split: a tenth, at least so many, at most a third."""
FEWEST = 9
"""Images that a split needs: crowds have 7 neighbours."""
NAMED = 8
"""Images that a message names; the others are counted."""


@dataclass(frozen=True)
class Preprocess:
    """How an image gets to the size that a network takes; the kinds are those of the repository.

    Attributes:
        kind: ``resize_and_crop`` (to a square, then a part of it), ``crop`` (a part as it is),
            ``scale_width`` (to a width), ``scale_width_and_crop``, or ``none`` (as it is, to multiples of 4
            pixels).
        load_size: side or width in pixels before the crop.
        crop_size: side in pixels of the part that is kept; with ``scale_width`` the smallest height.
    """

    kind: PreprocessKind = "resize_and_crop"
    load_size: int = 256
    crop_size: int = 256

    def check(self) -> None:
        """Refuse sizes that no image can have.

        Raises:
            UserError: unknown kind, or sizes that exclude each other.
        """
        if self.kind not in get_args(PreprocessKind):
            raise unknown("preprocessing", self.kind, get_args(PreprocessKind))
        for name in ("load_size", "crop_size"):
            if getattr(self, name) < 1:
                raise UserError(
                    f"--{name.replace('_', '-')} is {getattr(self, name)}; it must be 1 pixel or more"
                )
        if self.kind.endswith("_and_crop") and self.load_size < self.crop_size:
            raise UserError(
                f"--load-size is {self.load_size}, below --crop-size {self.crop_size}; it must be as large"
            )

    def without_margin(self) -> Preprocess:
        """The same outside the training: an image is resized to its crop, as in the repository's tests."""
        return replace(self, load_size=self.crop_size) if self.kind.endswith("_and_crop") else self

    def __call__(self, image: Image.Image, place: tuple[float, float] = (0.5, 0.5)) -> Image.Image:
        """The prepared image.

        Args:
            image: of any size.
            place: of the crop, as shares in [0, 1] of the room that there is to the right and down.

        Raises:
            ValueError: the image is smaller than the crop.
        """
        width, height = image.size
        if self.kind == "resize_and_crop":
            width = height = self.load_size
        elif self.kind.startswith("scale_width"):
            if width != self.load_size or height < self.crop_size:
                width, height = self.load_size, int(max(self.load_size * height / width, self.crop_size))
        elif self.kind == "none":
            width, height = (max(4, 4 * round(side / 4)) for side in (width, height))
        if (width, height) != image.size:
            image = image.resize((width, height), Image.Resampling.BICUBIC)
        if not self.kind.endswith("crop"):
            return image
        room = width - self.crop_size, height - self.crop_size
        if min(room) < 0:
            raise ValueError(f"{width} × {height} pixels are less than the crop of {self.crop_size}")
        left, top = (round(share * space) for share, space in zip(place, room, strict=True))
        return image.crop((left, top, left + self.crop_size, top + self.crop_size))


@dataclass(frozen=True)
class Reading:
    """How a folder is read.

    Attributes:
        direction: what is input and what is target.
        preprocess: for the training images.
        odd_images: ``refuse`` the folder for a single unusable image, or ``skip`` those.
        channels: of input and target: 3, or 1 for grey.
        train, val, test: at most so many images of a split, spread evenly; 0 = all.
        memory_gb: refuse to hold more than so many GB of images.
    """

    direction: Direction = "AtoB"
    preprocess: Preprocess = Preprocess()
    odd_images: OddImages = "refuse"
    channels: tuple[int, int] = (3, 3)
    train: int = 0
    val: int = 160
    test: int = 512
    memory_gb: float = 4.0

    def check(self) -> None:
        """Refuse what no folder can be read with.

        Raises:
            UserError: the option that is wrong.
        """
        self.preprocess.check()
        for name, value, known in (
            ("direction", self.direction, get_args(Direction)),
            ("way with odd images", self.odd_images, get_args(OddImages)),
        ):
            if value not in known:
                raise unknown(name, value, known)
        for split in SPLITS:
            if getattr(self, split) < 0:
                raise UserError(
                    f"--{split}-images is {getattr(self, split)}; it must be 0 (all of them) or more"
                )
        if any(count not in (1, 3) for count in self.channels):
            came, made = self.channels
            raise UserError(f"the networks take {came} → {made} channels; images have 3, or 1 for grey ones")
        if self.memory_gb <= 0:
            raise UserError(f"--memory-gb is {self.memory_gb}; it must be above 0")

    def reversed(self) -> Reading:
        """The same images for the way back: what was a target is an input."""
        direction: Direction = "BtoA" if self.direction == "AtoB" else "AtoB"
        return replace(self, direction=direction, channels=(self.channels[1], self.channels[0]))


class PairedSplits(NamedTuple):
    """A paired folder.

    Attributes:
        train, val, test: the pairs.
        notes: sentences for the user: what was left out, what stands in for a missing split.
    """

    train: PairedImages
    val: PairedImages
    test: PairedImages
    notes: tuple[str, ...]


class UnpairedSplits(NamedTuple):
    """An unaligned folder for unpaired work; ``first`` is the domain that the direction starts from."""

    train: UnpairedImages
    val: UnpairedImages
    test: UnpairedImages
    notes: tuple[str, ...]


class Source(NamedTuple):
    """Where one sample comes from.

    Attributes:
        name: path below its split, without suffix.
        first: file of A, or of A|B where there is no ``second``.
        second: file of B.
    """

    name: str
    first: Path
    second: Path | None = None


def open_image(path: Path) -> Image.Image:
    """An image file as RGB; transparency becomes white, 16-bit grey keeps its levels.

    Raises:
        UserError: not readable as an image, or of a kind without a fixed range.
    """
    try:
        with Image.open(path) as image:
            if image.mode in ("I", "F"):
                raise ValueError("32-bit levels, of which nothing says what is white")
            if image.mode.startswith("I;16"):  # converted as it is, 16-bit grey would be cut off at 255
                levels = (np.asarray(image) // 256).astype(np.uint8)
                return Image.fromarray(levels).convert("RGB")
            upright = ImageOps.exif_transpose(image)
            if "A" not in upright.getbands() and "transparency" not in upright.info:
                return upright.convert("RGB")
            layered = upright.convert("RGBA")
    except (UnidentifiedImageError, Image.DecompressionBombError, OSError, SyntaxError, ValueError) as error:
        raise UserError(
            f"{path} cannot be read as an image ({error}); remove it or save it again as PNG"
        ) from error
    return Image.alpha_composite(Image.new("RGBA", layered.size, "white"), layered).convert("RGB")


def as_tensor(image: Image.Image, channels: int) -> Tensor:
    """An image as (channels, H, W) uint8; one channel is its luminance."""
    array = np.array(image.convert("L" if channels == 1 else "RGB"))
    return torch.from_numpy(np.atleast_3d(array)).permute(2, 0, 1)


def find_images(folder: Path) -> list[Path]:
    """Image files below a folder, sorted by path."""
    return sorted(
        path
        for path in folder.rglob("*")
        if path.suffix.lower() in SUFFIXES and not path.name.startswith(".") and path.is_file()
    )


def layout(folder: Path) -> Literal["aligned", "unaligned"]:
    """Which of the two layouts a folder has.

    Raises:
        UserError: none of them, or both.
    """
    if not folder.is_dir():
        raise UserError(f"the image folder {folder} does not exist; name one with --data")
    aligned = (folder / "train").is_dir()
    sides = [side for side in "AB" if (folder / f"train{side}").is_dir()]
    if aligned and sides:
        raise UserError(f"{folder} has both train and train{sides[0]}; move one of the two layouts away")
    if aligned:
        return "aligned"
    if len(sides) == 1:
        missing = "B" if sides == ["A"] else "A"
        raise UserError(f"{folder} has train{sides[0]} but no train{missing}; both domains are needed")
    if not sides:
        raise UserError(
            f"{folder} has no images in a known layout; it needs train/ (A and B side by side in every "
            "file), or trainA/ and trainB/"
        )
    return "unaligned"


def _named(names: Sequence[str]) -> str:
    shown = ", ".join(names[:NAMED])
    return shown if len(names) <= NAMED else f"{shown} and {len(names) - NAMED} more"


def _by_name(folder: Path) -> dict[str, Path]:
    """Path below the folder without suffix → file.

    Raises:
        UserError: two files of one name: one of them would be lost without a word.
    """
    found: dict[str, Path] = {}
    for path in find_images(folder):
        name = path.relative_to(folder).with_suffix("").as_posix()
        if name in found:
            raise UserError(
                f"{folder} has {found[name].name} and {path.name}, which differ in their endings alone; "
                "images are known by what stands before: rename or remove one of them"
            )
        found[name] = path
    return found


def _paired_sources(folder: Path, split: Split) -> tuple[list[Source], list[str]]:
    """The pairs of one split, and the names of files without a partner."""
    if layout(folder) == "aligned":
        return [Source(name, path) for name, path in _by_name(folder / split).items()], []
    first, second = (_by_name(folder / f"{split}{side}") for side in "AB")
    shared = [Source(name, first[name], second[name]) for name in first if name in second]
    alone = [f"{split}A/{name}" for name in first if name not in second]
    alone += [f"{split}B/{name}" for name in second if name not in first]
    if bool(first) != bool(second):
        (full, count), empty = (("A", len(first)), "B") if first else (("B", len(second)), "A")
        raise UserError(
            f"{folder / f'{split}{empty}'} has no images, but {split}{full} has {count}; both domains are "
            "needed"
        )
    if first and not shared:
        raise UserError(
            f"no image of {folder / f'{split}A'} ({len(first)}) has one of the same name in {split}B "
            f"({len(second)}); paired work needs A and B under one file name, unpaired work (CycleGAN) the "
            "generator of the way back: --back latest_net_G_B.pth"
        )
    return shared, alone


def _rank(name: str) -> bytes:
    """A fixed order that has nothing to do with names: neighbours in a film do not stay together."""
    return hashlib.sha256(name.encode()).digest()


def _share(names: Sequence[str]) -> frozenset[str]:
    """The images that stand in for a missing split: always the same ones."""
    count = min(max(LEAST_SHARE, round(SHARE * len(names))), len(names) // 3)
    return frozenset(sorted(names, key=_rank)[:count])


def _fill(splits: dict[Split, list[Source]], folder: Path) -> list[str]:
    """Take what a missing val or test split needs from another one; says so."""
    notes = []
    if splits["val"] and not splits["test"]:
        names = sorted((source.name for source in splits["val"]), key=_rank)
        kept = set(names[: len(names) // 2])
        splits["test"] = [source for source in splits["val"] if source.name not in kept]
        splits["val"] = [source for source in splits["val"] if source.name in kept]
        notes.append(
            f"{folder} has no test split: {len(splits['test'])} of the {len(names)} val images are for the "
            "final figures"
        )
    for split in ("val", "test"):
        if not splits[split]:
            taken = _share([source.name for source in splits["train"]])
            splits[split] = [source for source in splits["train"] if source.name in taken]
            splits["train"] = [source for source in splits["train"] if source.name not in taken]
            notes.append(
                f"{folder} has no {split} split: {len(taken)} train images stand in for it; figures on them "
                "flatter networks that were trained on them"
            )
    return notes


def _spread(sources: list[Source], count: int) -> list[Source]:
    if not count or count >= len(sources):
        return sources
    return [sources[i] for i in torch.linspace(0, len(sources) - 1, count).round().long().tolist()]


def _place(name: str) -> tuple[float, float]:
    """Where a training image is cropped: anywhere, but the same place in every run."""
    digest = _rank(f"crop {name}")
    return digest[0] / 255, digest[1] / 255


def _read_pair(source: Source, reading: Reading, training: bool) -> tuple[Tensor, Tensor]:
    """Input and target, (C, H, W) uint8 each.

    Raises:
        UserError, ValueError: what is wrong with the image.
    """
    first = open_image(source.first)
    if source.second is None:
        width, height = first.size
        if width < 2 or width % 2:
            raise ValueError(f"{width} × {height} pixels are no two images side by side")
        second = first.crop((width // 2, 0, width, height))
        first = first.crop((0, 0, width // 2, height))
    else:
        second = open_image(source.second)
    both = (first, second) if reading.direction == "AtoB" else (second, first)
    made = _prepared(both, source.name, reading, training)
    if made[0].shape[-2:] != made[1].shape[-2:]:
        sizes = " and ".join(f"{image.width} × {image.height}" for image in (first, second))
        raise ValueError(f"A and B differ in size: {sizes}")
    return made[0], made[1]


def _prepared(
    images: Sequence[Image.Image], name: str, reading: Reading, training: bool
) -> tuple[Tensor, ...]:
    place = _place(name) if training else (0.5, 0.5)
    counts = reading.channels if len(images) == 2 else reading.channels[:1]
    return tuple(
        as_tensor(reading.preprocess(image, place), count)
        for image, count in zip(images, counts, strict=True)
    )


def _read_one(source: Source, reading: Reading, training: bool) -> tuple[Tensor, ...]:
    """One image of one domain, (C, H, W) uint8."""
    return _prepared((open_image(source.first),), source.name, reading, training)


Reader = Callable[[Source], tuple[Tensor, ...]]


def _load(sources: Sequence[Source], read: Reader) -> tuple[list[Tensor], list[str], dict[str, str]]:
    """Read all samples into one tensor per part; the good ones' names, and what is wrong with the others."""
    names: list[str] = []
    wrong: dict[str, str] = {}
    stacks: list[Tensor] = []

    def attempt(source: Source) -> tuple[Tensor, ...] | str:
        try:
            return read(source)
        except ValueError as error:  # a UserError is one
            return str(error).split("; ")[0]

    with ThreadPoolExecutor() as pool:
        for source, parts in zip(sources, pool.map(attempt, sources), strict=True):
            if isinstance(parts, str):
                wrong[source.name] = parts
                continue
            if not stacks:
                stacks = [torch.empty(len(sources), *part.shape, dtype=torch.uint8) for part in parts]
            if stacks[0].shape[1:] != parts[0].shape:
                (_, _, height, width), (_, own_height, own_width) = stacks[0].shape, parts[0].shape
                wrong[source.name] = f"{own_width} × {own_height} pixels where others have {width} × {height}"
                continue
            for stack, part in zip(stacks, parts, strict=True):
                stack[len(names)] = part
            names.append(source.name)
    return [stack[: len(names)] for stack in stacks], names, wrong


def _report(wrong: Mapping[str, str], where: str, reading: Reading, advice: str = "") -> list[str]:
    """Notes on unusable images, or the refusal, with further advice.

    Raises:
        UserError: with ``refuse``.
    """
    if not wrong:
        return []
    named = _named([f"{name} ({reason})" for name, reason in wrong.items()])
    if reading.odd_images == "refuse":
        raise UserError(
            f"{len(wrong)} images of {where} cannot be used: {named}; put them right, or leave them out with "
            f"--odd-images skip{advice}"
        )
    return [f"{len(wrong)} images of {where} are left out: {named}"]


def _check_memory(sources: Iterable[Sequence[Source]], read: Reader, reading: Reading) -> None:
    """Refuse more than the limit before anything large is read.

    Raises:
        UserError: with the size and what makes it smaller.
    """
    sources = list(sources)
    first = next((parts for many in sources if (parts := _first(many, read))), ())
    gigabytes = sum(map(len, sources)) * sum(part.numel() for part in first) / 1e9
    if gigabytes > reading.memory_gb:
        raise UserError(
            f"the images take {gigabytes:.1f} GB of memory, more than --memory-gb {reading.memory_gb:g}; use "
            "fewer (--train-images), smaller ones (--crop-size), or a higher limit"
        )


def _first(sources: Sequence[Source], read: Reader) -> tuple[Tensor, ...]:
    """The first readable sample of the first few."""
    for source in sources[:5]:
        try:
            return read(source)
        except ValueError:
            continue
    return ()


def _enough(count: int, where: str) -> None:
    if count < FEWEST:
        raise UserError(f"{where} has {count} usable images; at least {FEWEST} are needed")


@cache
def load_pairs(folder: Path, reading: Reading) -> PairedSplits:
    """Read a folder for paired work; remembered, because a program asks for it more than once.

    Training images are cropped anywhere (a fixed place for every name; training moves and mirrors them), val
    and test images in the middle. As in the repository's own tests, those are resized to the crop size where
    the training resizes to a larger one.

    Raises:
        UserError: no known layout, an empty or one-sided folder, unusable images that are to be refused,
            too much for the memory.
    """
    reading.check()
    splits: dict[Split, list[Source]] = {}
    alone: list[str] = []
    for split in SPLITS:
        splits[split], unmatched = _paired_sources(folder, split)
        alone += unmatched
    if not splits["train"]:
        where = "train" if layout(folder) == "aligned" else "trainA and trainB"
        raise UserError(f"{folder} has no images in {where}; allowed are {', '.join(sorted(SUFFIXES))}")
    advice = "; images without partners need --back, the generator of the way back"
    notes = _report(dict.fromkeys(alone, "no partner"), str(folder), reading, advice)
    borrowed = [split for split in SPLITS if not splits[split]]
    notes += _fill(splits, folder)
    for split in SPLITS:
        splits[split] = _spread(splits[split], getattr(reading, split))
    readers: dict[Split, Reader] = {
        split: partial(_read_pair, reading=reading_of(reading, split), training=split == "train")
        for split in SPLITS
    }
    _check_memory(splits.values(), readers["val"], reading)
    loaded: dict[Split, PairedImages] = {}
    for split in SPLITS:
        stacks, names, wrong = _load(splits[split], readers[split])
        notes += _report(wrong, f"{folder} ({split})", reading)
        _enough(len(names), f"{folder} ({split}{', taken from another split' * (split in borrowed)})")
        loaded[split] = PairedImages(stacks[0], stacks[1], tuple(names))
    shapes = {tuple(images.inputs.shape[-2:]) for images in loaded.values()}
    if len(shapes) > 1:
        sizes = ", ".join(sorted(f"{width} × {height}" for height, width in shapes))
        raise UserError(f"the splits of {folder} differ in size ({sizes}); use --preprocess resize_and_crop")
    return PairedSplits(loaded["train"], loaded["val"], loaded["test"], tuple(notes))


def reading_of(reading: Reading, split: Split) -> Reading:
    """How one split is read."""
    return reading if split == "train" else replace(reading, preprocess=reading.preprocess.without_margin())


@cache
def load_unpaired(folder: Path, reading: Reading) -> UnpairedSplits:
    """Read an unaligned folder for unpaired work; remembered. See :func:`load_pairs`.

    Both directions share the images in memory.

    Raises:
        UserError: another layout, an empty or one-sided folder, unusable images that are to be refused, too
            much for the memory.
    """
    reading.check()
    if layout(folder) != "unaligned":
        raise UserError(f"{folder} holds pairs; unpaired work needs trainA/ and trainB/")
    if reading.direction == "BtoA":
        there = load_unpaired(folder, reading.reversed())
        train, val, test = (images.swapped() for images in there[:3])
        return UnpairedSplits(train, val, test, there.notes)
    sides = ("A", "B")
    notes: list[str] = []
    domains = []
    for side in sides:
        splits: dict[Split, list[Source]] = {
            split: [Source(name, path) for name, path in _by_name(folder / f"{split}{side}").items()]
            for split in SPLITS
        }
        if not splits["train"]:
            raise UserError(f"{folder / f'train{side}'} has no images; both domains are needed")
        notes += [f"{side}: {note}" for note in _fill(splits, folder)]
        domains.append({split: _spread(splits[split], getattr(reading, split)) for split in SPLITS})
    readings = [replace(reading, channels=(count, count)) for count in reading.channels]
    read = partial(_read_one, reading=readings[0], training=False)
    _check_memory([sources for splits in domains for sources in splits.values()], read, reading)
    loaded: dict[Split, UnpairedImages] = {}
    for split in SPLITS:
        parts = []
        for side, one, splits in zip(sides, readings, domains, strict=True):
            reader = partial(_read_one, reading=reading_of(one, split), training=split == "train")
            stacks, names, wrong = _load(splits[split], reader)
            notes += _report(wrong, str(folder / f"{split}{side}"), reading)
            _enough(len(names), str(folder / f"{split}{side}"))
            parts.append((stacks[0], tuple(names)))
        (first, first_names), (second, second_names) = parts
        loaded[split] = UnpairedImages(first, second, first_names, second_names)
    return UnpairedSplits(loaded["train"], loaded["val"], loaded["test"], tuple(notes))


def load_drawn(folder: Path, reading: Reading) -> PairedSplits:
    """Read an unaligned folder for unpaired work into rows: each image beside one that was drawn for it.

    Val and test have as many images of either domain, so that none counts twice in a distribution; to train
    on, the smaller domain starts again when it is through.

    Raises:
        UserError: as :func:`load_unpaired`, or images that differ in size.
    """
    found = load_unpaired(folder, reading)
    notes = list(found.notes)

    def even(split: str, images: UnpairedImages) -> PairedImages:
        counts = len(images.first), len(images.second)
        if counts[0] != counts[1]:
            notes.append(f"{split} has {counts[0]} and {counts[1]} images: {min(counts)} of either are used")
        return _drawn(images.take(min(counts)))

    val, test = even("val", found.val), even("test", found.test)
    splits = PairedSplits(_drawn(found.train), val, test, tuple(notes))
    sides = {tuple(side.shape[-2:]) for images in splits[:3] for side in (images.inputs, images.targets)}
    if len(sides) > 1:
        sizes = ", ".join(sorted(f"{width} × {height}" for height, width in sides))
        raise UserError(f"the images of {folder} differ in size ({sizes}); use --preprocess resize_and_crop")
    return splits


def _drawn(images: UnpairedImages) -> PairedImages:
    """Rows of both domains, named after both images."""
    first, second = itertools.cycle(images.first_names), itertools.cycle(images.second_names)
    names = tuple(f"{next(first)} beside {next(second)}" for _ in range(len(images)))
    return replace(images.drawn(), names=names)
