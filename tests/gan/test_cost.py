from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from gan.cost import CostModel, build_cost_model, published_macs
from gan.groups import find_groups
from gan.networks import Architecture
from gan.slicing import Slicer
from tests.gan.conftest import random, tiny_discriminator, tiny_generator

CONVOLUTIONS = (nn.Conv2d, nn.ConvTranspose2d)
NETWORKS = {
    "tiny unet": (tiny_generator, 3, 8),
    "tiny patch": (tiny_discriminator, 6, 8),
    "unet_64 instance": (Architecture("unet_64", base_width=4, norm="instance").build, 3, 64),
    "resnet_6blocks batch": (Architecture("resnet_6blocks", base_width=4).build, 3, 16),
    "basic without norm": (Architecture("basic", 6, 1, base_width=4, norm="none").build, 6, 32),
    "pixel": (Architecture("pixel", 6, 1, base_width=4).build, 6, 8),
}


def count_macs(network: nn.Module, inputs: torch.Tensor) -> int:
    """Multiply-accumulates of one image, counted while it runs."""
    total = 0

    def note(module: nn.Module, args: tuple[torch.Tensor, ...], out: torch.Tensor) -> None:
        nonlocal total
        area = module.kernel_size[0] * module.kernel_size[1]
        if isinstance(module, nn.ConvTranspose2d):  # every input value is spread over the kernel
            total += args[0][0].numel() * area * module.weight.shape[1]
        else:  # every output value is gathered over the kernel
            total += out[0].numel() * area * module.weight.shape[1]

    hooks = [m.register_forward_hook(note) for m in network.modules() if isinstance(m, CONVOLUTIONS)]
    with torch.no_grad():
        network(inputs)
    for hook in hooks:
        hook.remove()
    return total


@pytest.mark.parametrize("name", NETWORKS)
def test_cost_of_plans_is_that_of_the_sliced_networks(name):
    build, channels, size = NETWORKS[name]
    network = build().eval()
    inputs = torch.zeros(1, channels, size, size)
    groups = find_groups(network, [inputs])
    cost, slicer = build_cost_model(network, groups, [inputs]), Slicer(network, groups)
    rng = np.random.default_rng(0)
    plans = [np.array([rng.integers(1, g.channels + 1) for g in groups]) for _ in range(4)]
    for widths in [cost.dense, np.ones_like(cost.dense), *plans]:
        sliced = slicer.network(network.state_dict(), widths.tolist())
        assert cost.macs(widths) == count_macs(sliced, inputs)
        assert cost.params(widths) == sum(p.numel() for p in sliced.parameters())


@pytest.mark.parametrize(
    ("architecture", "giga"),
    [(Architecture("unet_256"), 6.05), (Architecture("resnet_9blocks", norm="instance"), 49.55)],
    ids=["unet_256", "resnet_9blocks"],
)
def test_true_macs_at_256_pixels(architecture, giga):
    with torch.device("meta"):  # only shapes are asked for
        network, image = architecture.build().eval(), torch.zeros(1, 3, 256, 256)
    cost = build_cost_model(network, (), [image])
    none = np.zeros(0, dtype=np.int64)
    assert round(float(cost.macs(none)) / 1e9, 2) == giga
    assert cost.params(none) == sum(p.numel() for p in network.parameters())


@pytest.mark.parametrize(
    ("architecture", "giga"),
    [(Architecture("unet_256"), 18.14), (Architecture("resnet_9blocks", norm="instance"), 56.80)],
    ids=["unet_256", "resnet_9blocks"],
)
def test_macs_as_papers_count_them(architecture, giga):
    """Published: 18.6 G, with the outermost level twice, and 56.8 G."""
    with torch.device("meta"):
        network, image = architecture.build().eval(), torch.zeros(1, 3, 256, 256)
    assert round(published_macs(network, [image]) / 1e9, 2) == giga
    first, last = (network.model.model[place] for place in (0, 3)) if "unet" in architecture.name else (0, 0)
    if first:
        outermost = first.weight.numel() * 128**2 + last.weight.numel() * 256**2
        assert round((published_macs(network, [image]) + outermost) / 1e9, 1) == 18.6


@pytest.fixture
def chain() -> CostModel:
    """Two convolutions on 4 × 4 pixels: 2 → (3 channels) → 1, the first 3 × 3 with a norm."""
    network = nn.Sequential(nn.Conv2d(2, 3, 3, padding=1), nn.BatchNorm2d(3), nn.Conv2d(3, 1, 1)).eval()
    inputs = [torch.zeros(1, 2, 4, 4)]
    return build_cost_model(network, find_groups(network, inputs), inputs)


def test_cost_by_hand(chain):
    assert chain.dense.tolist() == [3]
    assert chain.macs(np.array([3])) == 16 * 9 * 2 * 3 + 16 * 3 * 1
    assert chain.macs(np.array([1])) == 16 * 9 * 2 + 16
    assert chain.params(np.array([3])) == (9 * 2 * 3 + 3) + (3 + 3) + (3 + 1)
    assert chain.params(np.array([1])) == (9 * 2 + 1) + 2 + (1 + 1)


def test_widths_may_come_in_any_shape():
    network = tiny_generator()
    inputs = [torch.zeros(1, 3, 8, 8)]
    cost = build_cost_model(network, find_groups(network, inputs), inputs)
    widths = np.random.default_rng(0).integers(1, 9, size=(2, 3, 5))
    for kind in ("macs", "params"):
        found = cost.of(kind, widths)
        assert found.shape == (2, 3)
        assert found.tolist() == [[float(cost.of(kind, row)) for row in rows] for rows in widths]
    assert not np.array_equal(cost.of("macs", widths), cost.of("params", widths))


def test_cost_grows_with_every_width():
    network = tiny_generator()
    inputs = [torch.zeros(1, 3, 8, 8)]
    cost = build_cost_model(network, find_groups(network, inputs), inputs)
    wider = np.full(5, 4) + np.eye(5, dtype=np.int64)
    for kind in ("macs", "params"):
        assert (cost.of(kind, wider) > cost.of(kind, np.full(5, 4))).all()


def test_grouped_convolutions_are_counted():
    network = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1, groups=4), nn.ConvTranspose2d(8, 4, 2, 2, groups=2))
    inputs = torch.randn(1, 8, 4, 4, generator=random())
    cost, none = build_cost_model(network, (), [inputs]), np.zeros(0, dtype=np.int64)
    assert cost.macs(none) == count_macs(network, inputs) == 16 * 9 * 2 * 8 + 16 * 4 * 2 * 8
    assert cost.params(none) == sum(p.numel() for p in network.parameters())


def test_building_changes_nothing():
    network = tiny_generator()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    inputs = [torch.randn(1, 3, 8, 8, generator=random())]
    build_cost_model(network, find_groups(network, inputs), inputs)
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
