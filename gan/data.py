"""Images as tensors: the embedded emoji, and the batches that training draws from them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from importlib import resources
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from gan.errors import unknown

Split = Literal["train", "val", "test"]
SPLITS: tuple[Split, ...] = ("train", "val", "test")


def to_float(images: Tensor) -> Tensor:
    """uint8 [0, 255] → float32 [−1, 1]."""
    return images.to(torch.float32) / 127.5 - 1.0


def to_uint8(images: Tensor) -> Tensor:
    """float [−1, 1] → uint8 [0, 255], rounded."""
    return ((images.clamp(-1, 1) + 1.0) * 127.5).round().to(torch.uint8)


@dataclass(frozen=True)
class PairedImages:
    """Aligned pairs.

    Attributes:
        inputs: (N, 3, H, W) uint8, what the generator gets.
        targets: (N, 3, H, W) uint8, what it should make.
        names: N short names.
        partners: whether each target is its input's true counterpart; else it was drawn, for what needs rows.
    """

    inputs: Tensor
    targets: Tensor
    names: tuple[str, ...]
    partners: bool = True

    def __len__(self) -> int:
        return len(self.inputs)

    def tensors(self) -> tuple[Tensor, Tensor]:
        """All inputs and targets, float32 in [−1, 1]."""
        return to_float(self.inputs), to_float(self.targets)

    def take(self, count: int | None) -> PairedImages:
        """``count`` pairs spread evenly over the set (all, when there are fewer, or for None)."""
        if count is None or count >= len(self):
            return self
        rows = torch.linspace(0, len(self) - 1, count).round().long()
        names = tuple(self.names[i] for i in rows.tolist())
        return replace(self, inputs=self.inputs[rows], targets=self.targets[rows], names=names)

    def swapped(self) -> PairedImages:
        """The same pairs, for the way back: what was a target is an input."""
        return replace(self, inputs=self.targets, targets=self.inputs)

    def with_flips(self) -> PairedImages:
        """Every pair and its mirror image: 2N pairs."""
        inputs, targets = (torch.cat([images, images.flip(-1)]) for images in (self.inputs, self.targets))
        mirrored = tuple(f"{name} (mirrored)" for name in self.names)
        return replace(self, inputs=inputs, targets=targets, names=self.names + mirrored)


@dataclass(frozen=True)
class UnpairedImages:
    """Images of two domains; what stands in one row of both has nothing to do with each other.

    Attributes:
        first: (N, C, H, W) uint8, domain A.
        second: (M, C, H, W) uint8, domain B.
        first_names, second_names: N and M short names.
    """

    first: Tensor
    second: Tensor
    first_names: tuple[str, ...]
    second_names: tuple[str, ...]

    def __len__(self) -> int:
        """Images of the larger domain."""
        return max(len(self.first), len(self.second))

    def tensors(self) -> tuple[Tensor, Tensor]:
        """All images of both domains, float32 in [−1, 1]; N and M of them."""
        return to_float(self.first), to_float(self.second)

    def take(self, count: int | None) -> UnpairedImages:
        """``count`` images of each domain, spread evenly (all, where there are fewer, or for None)."""
        picked = []
        for images, names in ((self.first, self.first_names), (self.second, self.second_names)):
            kept = len(images) if count is None else min(count, len(images))
            rows = torch.linspace(0, len(images) - 1, kept).round().long()
            picked.append((images[rows], tuple(names[i] for i in rows.tolist())))
        (first, first_names), (second, second_names) = picked
        return UnpairedImages(first, second, first_names, second_names)

    def swapped(self) -> UnpairedImages:
        """The same images, for the way back: B is the first domain, A the second."""
        return UnpairedImages(self.second, self.first, self.second_names, self.first_names)

    def drawn(self) -> PairedImages:
        """Each image beside the one in its row; the smaller domain starts again when it is through.

        For what needs rows: margins, statistics, the warm-up. The names are those of the first domain.
        """
        rows = torch.arange(len(self))
        names = tuple(self.first_names[i] for i in (rows % len(self.first)).tolist())
        # The larger domain is taken as it is: images may fill gigabytes.
        first, second = (
            images if len(images) == len(self) else images[rows % len(images)]
            for images in (self.first, self.second)
        )
        return PairedImages(first, second, names, partners=False)

    @classmethod
    def of(cls, pairs: PairedImages) -> UnpairedImages:
        """Both sides of pairs as domains of their own."""
        return cls(pairs.inputs, pairs.targets, pairs.names, pairs.names)


def _tiles(name: str, tile: int, columns: int, count: int) -> Tensor:
    path = resources.files("gan") / "assets" / "emoji64" / name
    with path.open("rb") as handle:
        sheet = np.asarray(Image.open(handle).convert("RGB"))
    rows = sheet.shape[0] // tile
    tiles = sheet.reshape(rows, tile, columns, tile, 3).transpose(0, 2, 4, 1, 3).reshape(-1, 3, tile, tile)
    return torch.from_numpy(np.ascontiguousarray(tiles[:count]))


EMBEDDED = {"edges2emoji": ("edges.png", "noto.webp"), "noto2twemoji": ("noto.webp", "twemoji.webp")}
"""Embedded images → the sheets of the inputs and of the targets."""


FRAMED = ("noto2twemoji",)
"""Embedded images that are brought into one frame. Twemoji fill their tiles, Noto keep a pixel's margin: told
apart by that alone, generators draw halos around everything instead of a style."""
FRAME = 60
"""Pixels of the longer side of a framed drawing; the margin of 2 is what augmentation moves it by."""
PAPER = 245
"""Lightest value that is part of a drawing."""


def framed(images: Tensor, side: int = FRAME) -> Tensor:
    """Every drawing scaled to one size and put into the middle of its white tile.

    Args:
        images: (N, 3, H, W) uint8 on white.
        side: pixels of the longer side of what is drawn; an empty tile stays as it is.
    """
    return torch.from_numpy(np.stack([_framed(image.permute(1, 2, 0).numpy(), side) for image in images]))


def _framed(image: NDArray[np.uint8], side: int) -> NDArray[np.uint8]:
    """(H, W, 3) → (3, H, W)."""
    drawn = (image <= PAPER).any(2)
    if not drawn.any():
        return image.transpose(2, 0, 1)
    rows, columns = np.nonzero(drawn)
    part = Image.fromarray(image[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1])
    scale = side / max(part.size)
    width, height = (max(1, round(scale * length)) for length in part.size)
    tile = np.full_like(image, 255)
    row, column = (tile.shape[0] - height) // 2, (tile.shape[1] - width) // 2
    scaled = np.asarray(part.resize((width, height), Image.Resampling.BICUBIC))
    tile[row : row + height, column : column + width] = scaled
    return tile.transpose(2, 0, 1)


@cache
def embedded_pairs(task: str, split: Split) -> PairedImages:
    """One split of embedded images, each with its true counterpart: 1,084 / 160 / 256 pairs of 64 × 64.

    ``edges2emoji``: Canny edges of the Noto drawings → the drawings. ``noto2twemoji``: Noto drawings →
    Twemoji drawings, all of one size (:func:`framed`); training must not use those pairs, see
    :func:`embedded_unpaired`. Drawing variants of one emoji are kept in one split.
    """
    if task not in EMBEDDED:
        raise unknown("embedded task", task, EMBEDDED)
    if split not in SPLITS:
        raise unknown("split", split, SPLITS)
    index = json.loads((resources.files("gan") / "assets" / "emoji64" / "index.json").read_text())
    shape = index["tile"], index["columns"], index["count"]
    rows = [i for i, item in enumerate(index["items"]) if item["split"] == split]
    names = tuple(index["items"][i]["name"] for i in rows)
    inputs, targets = (_tiles(sheet, *shape)[rows] for sheet in EMBEDDED[task])
    if task in FRAMED:
        inputs, targets = framed(inputs), framed(targets)
    return PairedImages(inputs, targets, names)


@cache
def embedded_unpaired(task: str, split: Split) -> UnpairedImages:
    """The images of :func:`embedded_pairs` without their pairing: the second domain in a fixed other order.

    No image stands in the row of its counterpart.
    """
    pairs = embedded_pairs(task, split)
    order = torch.randperm(len(pairs), generator=torch.Generator().manual_seed(0))
    # Along the cycle of a random order everybody's follower is somebody else.
    follower = torch.empty_like(order)
    follower[order] = order.roll(-1)
    names = tuple(pairs.names[i] for i in follower.tolist())
    return UnpairedImages(pairs.inputs, pairs.targets[follower], pairs.names, names)


def _moves(images: Tensor, shift: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Rows (N, H) and columns (N, W) to read each image at: half are mirrored, all moved, edges repeated."""
    count, _, height, width = images.shape
    mirrored = torch.rand(count, generator=generator) < 0.5
    moves = (
        torch.randint(-shift, shift + 1, (count, 2), generator=generator)
        if shift
        else torch.zeros(count, 2).long()
    )
    rows = (torch.arange(height)[None] + moves[:, :1]).clamp(0, height - 1)
    columns = torch.arange(width)[None].expand(count, -1)
    columns = torch.where(mirrored[:, None], columns.flip(-1), columns)
    return rows, (columns + moves[:, 1:]).clamp(0, width - 1)


def _read(images: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Each image (N, C, H, W) at its own rows and columns."""
    count, channels = images.shape[:2]
    picked = torch.arange(count)[:, None, None, None], torch.arange(channels)[None, :, None, None]
    return images[(*picked, rows[:, None, :, None], columns[:, None, None, :])]


def augment(inputs: Tensor, targets: Tensor, shift: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Mirror half of the pairs and move each by up to ``shift`` pixels, edges repeated.

    Args:
        inputs: (N, C, H, W) uint8; ``targets`` alike. A pair is moved as one.
    """
    at = _moves(inputs, shift, generator)
    return _read(inputs, *at), _read(targets, *at)


def augment_alone(images: Tensor, shift: int, generator: torch.Generator) -> Tensor:
    """:func:`augment` for images (N, C, H, W) uint8 without partners."""
    return _read(images, *_moves(images, shift, generator))


def unpaired_batches(
    images: UnpairedImages, size: int, generator: torch.Generator, shift: int = 0
) -> Iterator[tuple[Tensor, Tensor]]:
    """One pass over the larger domain, full batches only; the smaller one starts again when it is through.

    Both are in random orders of their own and augmented apart: (A, B), float32 in [−1, 1].
    """
    size = min(size, len(images.first), len(images.second))
    steps = len(images) // size

    def shown(domain: Tensor) -> Iterator[Tensor]:
        passes = -(-steps * size // len(domain))
        order = torch.cat([torch.randperm(len(domain), generator=generator) for _ in range(passes)])
        for rows in order[: steps * size].split(size):
            yield to_float(augment_alone(domain[rows], shift, generator))

    yield from zip(shown(images.first), shown(images.second), strict=True)


def batches(
    pairs: PairedImages, size: int, generator: torch.Generator, shift: int = 0, augmented: bool = True
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """One epoch in random order, full batches only: (inputs, targets) float32 in [−1, 1], and the rows."""
    order = torch.randperm(len(pairs), generator=generator)
    size = min(size, len(pairs))
    for start in range(0, len(pairs) - size + 1, size):
        rows = order[start : start + size]
        inputs, targets = pairs.inputs[rows], pairs.targets[rows]
        if augmented:
            inputs, targets = augment(inputs, targets, shift, generator)
        yield to_float(inputs), to_float(targets), rows
