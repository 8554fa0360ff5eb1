"""Known ways of making a generator's outputs worse, at any level: what a gap has to notice.

Pure functions of (N, 3, H, W) images in [−1, 1] and a level in [0, 1], where 0 changes nothing and every
level is worse than the levels below it. The randomness depends on the seed alone, not on the level: the
same noise grows, the same modes go first.

What each gap has to see, and to order by level (`tests/gan/test_directions.py`):

| distortion | what it stands for | crowd | arrangement | MMD, real | L1, feature | balance |
|---|---|---|---|---|---|---|
| ``add_noise`` | artefacts: outputs leave the manifold | yes | yes | yes | yes | yes |
| ``blur`` | weak networks' averages: detail goes | yes | yes | yes | yes | yes |
| ``pull_together`` | collapse: all crowds shrink into one point | yes | yes | yes | yes | yes |
| ``drop_modes`` | lost modes: some outputs are copies of others | yes | yes | yes | yes | yes |
| ``swap`` | the right images for the wrong inputs | | yes | | yes | yes |

``swap`` keeps the set of outputs, and with it every distance between distributions; the crowd notices that
each sample is left out of its own neighbourhood, but need not.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

NOISE = 1.0  # standard deviation at level 1: half the range of a pixel
BLUR = 1 / 8  # standard deviation at level 1, as a share of the image's height


def add_noise(images: Tensor, level: float, seed: int = 0) -> Tensor:
    """Gaussian noise of standard deviation ``level``, clamped to [−1, 1] again."""
    _check(images, level)
    if level == 0:
        return images.clone()
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(seed)).to(images)
    return (images + NOISE * level * noise).clamp(-1, 1)


def blur(images: Tensor, level: float, seed: int = 0) -> Tensor:
    """Gaussian blur of standard deviation ``level`` × height / 8, edges replicated; ``seed`` is ignored."""
    _check(images, level)
    sigma = BLUR * level * images.shape[-2]
    radius = math.ceil(3 * sigma)
    if radius == 0:
        return images.clone()
    steps = torch.arange(-radius, radius + 1, device=images.device, dtype=images.dtype)
    kernel = (-(steps**2) / (2 * sigma**2)).exp()
    kernel = (kernel / kernel.sum()).expand(images.shape[1], 1, 1, -1)
    for axis in (2, 3):
        weights = kernel if axis == 3 else kernel.transpose(2, 3)
        padding = (radius, radius, 0, 0) if axis == 3 else (0, 0, radius, radius)
        images = F.conv2d(F.pad(images, padding, mode="replicate"), weights, groups=images.shape[1])
    return images


def pull_together(images: Tensor, level: float, seed: int = 0) -> Tensor:
    """Every image moved the share ``level`` of its way to one of them, which ``seed`` picks."""
    _check(images, level)
    return torch.lerp(images, images[_order(images, seed)[:1]], level)


def drop_modes(images: Tensor, level: float, seed: int = 0) -> Tensor:
    """The share ``level`` of the images replaced by copies of the nearest (L2) one that is kept.

    At least one image is kept, and each level keeps some of what the level below it kept.
    """
    _check(images, level)
    order = _order(images, seed)
    kept = order[: max(1, len(images) - round(level * len(images)))].sort().values
    flat = images.flatten(1)
    nearest = torch.cdist(flat, flat[kept]).argmin(dim=1)
    nearest[kept] = torch.arange(len(kept), device=images.device)
    return images[kept[nearest]]


def swap(images: Tensor, level: float, seed: int = 0) -> Tensor:
    """The share ``level`` of the images handed round among themselves: the same set in another order."""
    _check(images, level)
    moved = _order(images, seed)[: round(level * len(images))]
    result = images.clone()
    result[moved] = images[moved.roll(1)]
    return result


DISTORTIONS: dict[str, Callable[[Tensor, float, int], Tensor]] = {
    "add_noise": add_noise,
    "blur": blur,
    "pull_together": pull_together,
    "drop_modes": drop_modes,
    "swap": swap,
}
"""Name → (images, level, seed) → images."""


def _order(images: Tensor, seed: int) -> Tensor:
    return torch.randperm(len(images), generator=torch.Generator().manual_seed(seed)).to(images.device)


def _check(images: Tensor, level: float) -> None:
    if images.ndim != 4 or len(images) == 0 or not images.is_floating_point():
        raise ValueError(f"images are {tuple(images.shape)} {images.dtype}; expected float (N ≥ 1, C, H, W)")
    if not 0 <= level <= 1:
        raise ValueError(f"the level of a distortion is {level}; it must be in [0, 1]")
