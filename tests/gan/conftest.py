"""The gan core in miniature: three levels, 8 × 8 images, features by a random projection."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

from gan.data import PairedImages, to_uint8
from gan.elastic import ElasticNetwork, order_channels
from gan.features import Extractor
from gan.groups import ChannelGroup, find_groups
from gan.losses import paired_input
from gan.networks import PatchDiscriminator, UnetGenerator
from gan.norm_statistics import recompute_statistics
from gan.tasks import Task

SIZE = 8
GENERATOR_WIDTHS = (8, 12, 16, 12, 8)
DISCRIMINATOR_WIDTHS = (8, 12)


def random(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def randomise(network: nn.Module, seed: int = 0) -> nn.Module:
    """Weights, biases, norm parameters and statistics that all matter; in evaluation mode."""
    draws = random(seed)
    with torch.no_grad():
        for name, tensor in network.state_dict().items():
            if name.endswith("running_var") or (name.endswith("weight") and tensor.dim() == 1):
                tensor.uniform_(0.5, 1.5, generator=draws)
            elif tensor.is_floating_point():
                fan_in = max(1, tensor[0].numel()) if tensor.dim() > 1 else 4
                tensor.normal_(0.0, 2 / fan_in**0.5, generator=draws)
    return network.eval()


def tiny_generator(seed: int = 0, widths: Sequence[int] = GENERATOR_WIDTHS) -> nn.Module:
    """Five groups; (N, 3, 8, 8) → (N, 3, 8, 8)."""
    return randomise(UnetGenerator(3, 3, tuple(widths), "batch", False), seed)


def tiny_discriminator(
    seed: int = 1, widths: Sequence[int] = DISCRIMINATOR_WIDTHS, in_channels: int = 6
) -> nn.Module:
    """Two groups; (N, 6, 8, 8) → (N, 1, 2, 2)."""
    return randomise(PatchDiscriminator(in_channels, tuple(widths), "batch"), seed)


def tiny_pairs(count: int, seed: int = 0) -> PairedImages:
    """Smooth random pictures and, as targets, their negatives with the channels turned."""
    coarse = torch.randn(count, 3, 3, 3, generator=random(seed))
    images = torch.nn.functional.interpolate(coarse, size=SIZE, mode="bilinear").clamp(-1, 1)
    names = tuple(f"{seed}-{i}" for i in range(count))
    return PairedImages(to_uint8(images), to_uint8(-images.roll(1, dims=1)), names)


@dataclass(frozen=True)
class Pair:
    """A dense pair and all that a scorer needs of it."""

    generator: nn.Module
    discriminator: nn.Module
    pairs: PairedImages
    groups: dict[str, tuple[ChannelGroup, ...]]
    statistics: dict[str, Tensor]

    def ordered(self) -> dict[str, ElasticNetwork]:
        return {
            agent: order_channels(network, self.groups[agent])
            for agent, network in (("generator", self.generator), ("discriminator", self.discriminator))
        }


def make_pair(seed: int = 0, generator: nn.Module | None = None) -> Pair:
    """A random pair whose BatchNorm statistics are those that its full-width slices will get."""
    pairs, discriminator = tiny_pairs(12), tiny_discriminator(seed + 1)
    if generator is None:
        generator = tiny_generator(seed)
    inputs, targets = tiny_pairs(12, seed=1).tensors()
    recompute_statistics(generator, inputs)
    with torch.no_grad():
        made = generator(inputs)
    seen = torch.cat([paired_input(inputs, targets), paired_input(inputs, made)])
    recompute_statistics(discriminator, seen)
    groups = {
        "generator": find_groups(generator, [inputs[:1]]),
        "discriminator": find_groups(discriminator, [seen[:1]]),
    }
    for network in (generator, discriminator):
        network.requires_grad_(False)
    return Pair(generator, discriminator, pairs, groups, {"generator": inputs, "discriminator": seen})


@pytest.fixture(scope="session")
def _pair() -> Pair:
    return make_pair()


@pytest.fixture
def pair(_pair: Pair) -> Pair:
    """A dense pair of this test's own."""
    return copy.deepcopy(_pair)


def fake_extractor(name: str = "efficientnet_lite0", dim: int = 24) -> Extractor:
    """A fixed random projection under the name of the default extractor; patches are four corners."""
    projection = torch.randn(3 * SIZE * SIZE, dim, generator=random(7)) / SIZE

    def network(images: Tensor) -> tuple[Tensor, Tensor]:
        half = SIZE // 2
        corners = images.unfold(2, half, half).unfold(3, half, half)  # (n, 3, 2, 2, half, half)
        patches = corners.permute(0, 2, 3, 1, 4, 5).reshape(len(images), 4, -1)
        return torch.relu(images.flatten(1) @ projection), patches

    return Extractor(name, SIZE, dim, "projection", network)


@pytest.fixture
def extractor() -> Extractor:
    return fake_extractor()


@pytest.fixture
def task(pair: Pair) -> Task:
    """A task without files: 12 pairs to train on, 12 to choose on, 12 for the figures."""
    return Task(
        name="tiny",
        networks={"generator": pair.generator, "discriminator": pair.discriminator},
        architectures={},
        groups=pair.groups,
        train=tiny_pairs(12, seed=1),
        val=pair.pairs,
        test=tiny_pairs(12, seed=2),
        multiples={"generator": 4, "discriminator": 2},
        elastic_path=None,
    )
