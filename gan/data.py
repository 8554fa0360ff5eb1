"""Images as tensors: the embedded emoji, and the batches that training draws from them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Literal

import numpy as np
import torch
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
    """

    inputs: Tensor
    targets: Tensor
    names: tuple[str, ...]

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
        return PairedImages(
            self.inputs[rows], self.targets[rows], tuple(self.names[i] for i in rows.tolist())
        )

    def with_flips(self) -> PairedImages:
        """Every pair and its mirror image: 2N pairs."""
        inputs, targets = (torch.cat([images, images.flip(-1)]) for images in (self.inputs, self.targets))
        mirrored = tuple(f"{name} (mirrored)" for name in self.names)
        return PairedImages(inputs, targets, self.names + mirrored)


def _tiles(name: str, tile: int, columns: int, count: int) -> Tensor:
    path = resources.files("gan") / "assets" / "emoji64" / name
    with path.open("rb") as handle:
        sheet = np.asarray(Image.open(handle).convert("RGB"))
    rows = sheet.shape[0] // tile
    tiles = sheet.reshape(rows, tile, columns, tile, 3).transpose(0, 2, 4, 1, 3).reshape(-1, 3, tile, tile)
    return torch.from_numpy(np.ascontiguousarray(tiles[:count]))


@cache
def embedded_pairs(task: str, split: Split) -> PairedImages:
    """One split of an embedded paired task.

    ``edges2emoji``: Canny edges of the Noto drawings → the drawings, 64 × 64; 1,084 / 160 / 256
    pairs, drawing variants of one emoji kept in one split.
    """
    if task != "edges2emoji":
        raise unknown("embedded task", task, ("edges2emoji",))
    if split not in SPLITS:
        raise unknown("split", split, SPLITS)
    index = json.loads((resources.files("gan") / "assets" / "emoji64" / "index.json").read_text())
    shape = index["tile"], index["columns"], index["count"]
    rows = [i for i, item in enumerate(index["items"]) if item["split"] == split]
    names = tuple(index["items"][i]["name"] for i in rows)
    return PairedImages(_tiles("edges.png", *shape)[rows], _tiles("noto.png", *shape)[rows], names)


def augment(inputs: Tensor, targets: Tensor, shift: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Mirror half of the pairs and move each by up to ``shift`` pixels, edges repeated.

    Args:
        inputs: (N, 3, H, W) uint8; ``targets`` alike. A pair is moved as one.
    """
    n, _, height, width = inputs.shape
    mirrored = torch.rand(n, generator=generator) < 0.5
    moves = (
        torch.randint(-shift, shift + 1, (n, 2), generator=generator) if shift else torch.zeros(n, 2).long()
    )
    rows = (torch.arange(height)[None] + moves[:, :1]).clamp(0, height - 1)
    columns = torch.arange(width)[None].expand(n, -1)
    columns = torch.where(mirrored[:, None], columns.flip(-1), columns)
    columns = (columns + moves[:, 1:]).clamp(0, width - 1)
    picked = torch.arange(n)[:, None, None, None], torch.arange(3)[None, :, None, None]
    at = (*picked, rows[:, None, :, None], columns[:, None, None, :])
    return inputs[at], targets[at]


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
