from __future__ import annotations

import pytest
import torch
from torch import nn

from gan.checkpoints import state_hash
from gan.groups import ChannelGroup, Slot, discover_groups, find_groups, trace_resolutions, without_inplace
from gan.networks import Architecture
from gan.slicing import Slicer
from tests.gan.conftest import GENERATOR_WIDTHS, random, randomise, tiny_generator

COUNTS = [
    (Architecture("unet_64", base_width=4), 64, 11),
    (Architecture("unet_256", base_width=2), 256, 15),
    (Architecture("resnet_9blocks", base_width=4, norm="instance"), 16, 14),
    (Architecture("basic", 6, 1, base_width=4), 32, 4),
    (Architecture("pixel", 6, 1, base_width=4), 8, 2),
]
IDS = [architecture.name for architecture, _, _ in COUNTS]


def example(architecture: Architecture, size: int) -> list[torch.Tensor]:
    return [torch.zeros(1, architecture.in_channels, size, size)]


@pytest.mark.parametrize(("architecture", "size", "count"), COUNTS, ids=IDS)
@pytest.mark.parametrize("norm", ["batch", "instance"])
def test_counts_and_forward_order(architecture, size, count, norm):
    """Every width differs, so the order of the groups can be read off them."""
    widths = tuple(range(3, 3 + len(architecture.dense_widths)))
    pruned = Architecture(**{**architecture.to_dict(), "norm": norm, "widths": widths})
    groups = find_groups(pruned.build(), example(architecture, size))
    assert len(groups) == count
    assert tuple(group.channels for group in groups) == widths


@pytest.mark.parametrize(("architecture", "size", "count"), COUNTS, ids=IDS)
def test_groups_are_a_partition_that_spares_the_output(architecture, size, count):
    network = architecture.build()
    groups = find_groups(network, example(architecture, size))
    outs = [slot.module for group in groups for slot in group.slots if slot.axis == "out"]
    convolutions = [n for n, m in network.named_modules() if isinstance(m, nn.Conv2d | nn.ConvTranspose2d)]
    norms = [n for n, m in network.named_modules() if isinstance(m, nn.BatchNorm2d | nn.InstanceNorm2d)]
    assert len(set(outs)) == len(outs)
    last = list(trace_resolutions(network.eval(), example(architecture, size)))[-1]
    assert set(outs) == {*convolutions, *norms} - {last}
    assert [group.name for group in groups] == [
        next(s.module for s in group.slots if s.module in convolutions and s.axis == "out")
        for group in groups
    ]


def test_slots_of_the_unet_start_behind_the_skip():
    groups = find_groups(tiny_generator(), [torch.zeros(1, 3, 8, 8)])
    middle, inner, top = "model.model.1.model", "model.model.1.model.3.model", "model.model"
    wanted = [
        {Slot(f"{top}.0", "out", 0), Slot(f"{middle}.1", "in", 0), Slot(f"{top}.3", "in", 0)},
        {
            Slot(f"{middle}.1", "out", 0),
            Slot(f"{middle}.2", "out", 0),
            Slot(f"{inner}.1", "in", 0),
            Slot(f"{middle}.5", "in", 0),
        },
        {Slot(f"{inner}.1", "out", 0), Slot(f"{inner}.3", "in", 0)},
        {Slot(f"{inner}.3", "out", 0), Slot(f"{inner}.4", "out", 0), Slot(f"{middle}.5", "in", 12)},
        {Slot(f"{middle}.5", "out", 0), Slot(f"{middle}.6", "out", 0), Slot(f"{top}.3", "in", 8)},
    ]
    assert [set(group.slots) for group in groups] == wanted
    assert tuple(group.channels for group in groups) == GENERATOR_WIDTHS


def test_the_geometry_is_that_of_the_first_producer():
    first, *_, last = find_groups(tiny_generator(), [torch.zeros(1, 3, 8, 16)])
    slots = first.slots
    assert first == ChannelGroup("model.model.0", 8, slots, "conv", kernel=4, stride=2, resolution=4)
    assert (last.kind, last.kernel, last.stride, last.resolution) == ("transposed", 4, 2, 4)
    stem = find_groups(Architecture("resnet_6blocks", base_width=2).build(), [torch.zeros(1, 3, 16, 16)])[0]
    assert (stem.kind, stem.kernel, stem.stride, stem.resolution) == ("conv", 7, 1, 16)


def test_the_trunk_of_a_resnet_is_one_group():
    architecture = Architecture("resnet_9blocks", base_width=2)
    groups = find_groups(architecture.build(), example(architecture, 16))
    makers = [{s.module for s in group.slots if s.axis == "out"} for group in groups]
    trunk = {"model.7", "model.8"}
    trunk |= {f"model.{block}.conv_block.{place}" for block in range(10, 19) for place in (5, 6)}
    assert makers[2] == trunk
    assert [len(made) for made in makers] == [2, 2, 20, *[2] * 9, 2, 2]


@pytest.mark.parametrize("norm", ["batch", "instance"])
def test_the_network_is_not_changed(norm):
    network = Architecture("resnet_6blocks", base_width=2, norm=norm, dropout=True).build().train()
    network.model[3].inplace = True
    network.requires_grad_(False)
    before = state_hash(network)
    with torch.no_grad():
        find_groups(network, [torch.zeros(1, 3, 16, 16)])
    assert state_hash(network) == before
    assert network.training
    assert network.model[3].inplace
    assert not any(p.requires_grad or p.grad is not None for p in network.parameters())
    assert not any(module._forward_hooks for module in network.modules())


@pytest.mark.parametrize(("architecture", "size", "count"), COUNTS, ids=IDS)
def test_every_group_really_changes_width(architecture, size, count):
    if architecture.name == "unet_256":
        architecture, size, count = Architecture("unet_128", base_width=2), 128, 13
    network = randomise(architecture.build())
    inputs = torch.randn(1, architecture.in_channels, size, size, generator=random())
    groups = find_groups(network, [inputs])
    slicer = Slicer(network, groups)
    assert len(groups) == count
    state, wanted = network.state_dict(), network(inputs)
    for index, group in enumerate(groups):
        kept = group.channels // 2
        widths = [kept if g is group else g.channels for g in groups]
        smaller = slicer.network(state, widths)
        for slot in group.slots:
            cut, full = smaller.get_submodule(slot.module), network.get_submodule(slot.module)
            if not isinstance(cut, nn.Conv2d | nn.ConvTranspose2d):
                assert cut.num_features == full.num_features - group.channels + kept
            elif slot.axis == "out":
                assert cut.out_channels == full.out_channels - group.channels + kept
            else:
                assert cut.in_channels == full.in_channels - group.channels + kept
        made = smaller(inputs)
        assert made.shape == wanted.shape
        assert not torch.equal(made, wanted), f"group {index} changes nothing"


def test_in_place_activations_and_instance_norm_with_statistics():
    """As in old official checkpoints; the tracer trips over both."""
    network = nn.Sequential(
        nn.Conv2d(6, 5, 4, 2, 1),
        nn.LeakyReLU(0.2, inplace=True),
        nn.Conv2d(5, 7, 4, 2, 1),
        nn.InstanceNorm2d(7, track_running_stats=True),
        nn.LeakyReLU(0.2, inplace=True),
        nn.Conv2d(7, 9, 4, 1, 1),
        nn.InstanceNorm2d(9, affine=True, track_running_stats=True),
        nn.LeakyReLU(0.2, inplace=True),
        nn.Conv2d(9, 1, 4, 1, 1),
    )
    randomise(network)
    inputs = torch.randn(2, 6, 16, 16, generator=random())
    groups = find_groups(network, [inputs])
    assert [(group.name, group.channels) for group in groups] == [("0", 5), ("2", 7), ("5", 9)]
    assert network[1].inplace
    assert network[3].track_running_stats
    assert network[3].running_mean is not None
    slicer = Slicer(network, groups)
    torch.testing.assert_close(slicer.network(network.state_dict(), (5, 7, 9))(inputs), network(inputs))
    smaller = slicer.network(network.state_dict(), (2, 3, 4))
    assert smaller(inputs).shape == network(inputs).shape
    assert smaller[3].running_mean.tolist() == network[3].running_mean[:3].tolist()


def test_without_inplace():
    network = nn.Sequential(nn.ReLU(inplace=True), nn.Sequential(nn.LeakyReLU(inplace=True)))
    assert without_inplace(network) is network
    assert not any(getattr(module, "inplace", False) for module in network.modules())


@pytest.mark.parametrize(
    ("layers", "sentence"),
    [
        ((nn.Conv2d(8, 8, 3, groups=2), nn.Conv2d(8, 3, 1)), "they reach '2', a grouped convolution"),
        ((nn.Conv2d(8, 16, 3, groups=8), nn.Conv2d(16, 3, 1)), "they reach '2', a grouped convolution"),
        ((nn.GroupNorm(2, 8), nn.Conv2d(8, 3, 1)), "they reach '2', a GroupNorm of 2 groups"),
        ((nn.Flatten(), nn.Linear(8 * 8 * 8, 2)), "they reach '3' (Linear); only convolutions"),
    ],
    ids=["grouped", "multiplied", "group norm", "linear"],
)
def test_what_cannot_be_sliced_is_frozen_and_says_why(layers, sentence):
    network = nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU(), *layers)
    found = discover_groups(network, [torch.zeros(1, 3, 8, 8)])
    assert found.groups == ()
    assert found.frozen[0].name == "0"
    assert found.frozen[0].reason.startswith(sentence)


class Refined(nn.Module):
    """Its output is a sum, so the channels of both convolutions are the output's."""

    def __init__(self) -> None:
        super().__init__()
        self.inside, self.draft, self.change = nn.Conv2d(3, 5, 1), nn.Conv2d(5, 3, 1), nn.Conv2d(3, 3, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        draft = self.draft(self.inside(x))
        return draft + self.change(draft)


def test_channels_tied_to_the_output_are_no_decision():
    groups = find_groups(Refined(), [torch.zeros(1, 3, 8, 8)])
    assert [group.name for group in groups] == ["inside"]


class TwoHeaded(nn.Module):
    """Hands back what its first convolution makes, unread, beside the rest."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk, self.mask, self.image = nn.Conv2d(3, 5, 1), nn.Conv2d(5, 4, 1), nn.Conv2d(5, 3, 1)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x = self.trunk(x)
        return self.mask(x), self.image(x)


def test_channels_that_nothing_reads_are_no_decision():
    groups = find_groups(TwoHeaded(), [torch.zeros(1, 3, 8, 8)])
    assert [group.name for group in groups] == ["trunk"]


def test_resolutions_are_noted_in_forward_order():
    network = tiny_generator()
    found = trace_resolutions(network, [torch.zeros(1, 3, 8, 8)])
    assert list(found.values()) == [(64, 16, 4), (16, 4, 2), (4, 1, 1), (1, 4, 2), (4, 16, 4), (16, 64, 8)]
    assert next(iter(found)) == "model.model.0"
    assert not any(module._forward_hooks for module in network.modules())
