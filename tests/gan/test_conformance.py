from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from gan.checkpoints import state_hash
from gan.conformance import check_network
from gan.errors import UserError
from gan.groups import ChannelGroup, Slot, discover_groups, find_groups
from gan.slicing import Slicer
from gan.trial_cuts import narrower, tried_groups
from tests.gan.conftest import random, randomise
from tests.gan.foreign import (
    AttentionUnet,
    GroupNormGenerator,
    SeparableResnet,
    StarGenerator,
    StridedCritic,
)

IMAGE = torch.randn(1, 3, 32, 32, generator=random())
CASES = {
    "separable": (SeparableResnet, [IMAGE], 7, ["image"]),
    "attention": (AttentionUnet, [IMAGE], 14, ["att2.psi.0", "att1.psi.0", "image"]),
    "labels": (StarGenerator, [IMAGE, torch.eye(5)[:1]], 7, ["main.17"]),
    "group norms": (GroupNormGenerator, [IMAGE], 4, ["third", "grouped", "mask", "content"]),
    "critic": (StridedCritic, [torch.randn(1, 6, 32, 32, generator=random())], 2, ["patches"]),
}


@pytest.mark.parametrize("name", CASES)
def test_networks_from_other_hands_can_be_pruned(name):
    kind, inputs, groups, frozen = CASES[name]
    network = randomise(kind())
    before = state_hash(network)
    found = check_network(network, inputs)
    assert state_hash(network) == before
    assert [f for f in found.findings if f.passed is False] == []
    assert found.passed
    assert len(found.groups) == groups
    assert sorted(group.name for group in found.frozen) == sorted(frozen)
    assert found.least_macs < 0.25 * found.macs
    masked = next(f for f in found.findings if "masks" in f.name)
    assert masked.passed is (None if name == "group norms" else True)


def test_a_depthwise_convolution_is_carried_by_its_group():
    network = SeparableResnet()
    groups = find_groups(network, [IMAGE])
    assert set(groups[0].slots) == {
        Slot("stem.1", "out", 0),
        Slot("stem.2", "out", 0),
        Slot("down1.depthwise", "out", 0),
        Slot("down1.norm", "out", 0),
        Slot("down1.pointwise", "in", 0),
    }
    slicer = Slicer(network, groups)
    for width in (1, 3, 8):
        smaller = slicer.network(network.state_dict(), (width, *slicer.dense_widths[1:]))
        depthwise = smaller.get_submodule("down1.depthwise")
        assert depthwise.weight.shape == (width, 1, 3, 3)
        assert depthwise.groups == depthwise.in_channels == depthwise.out_channels == width
        assert smaller(IMAGE).shape == IMAGE.shape
        # The skeleton is shared by all widths: at one channel it must not forget what is depthwise.
        made = slicer.run(network.state_dict(), (width, *slicer.dense_widths[1:]), IMAGE, training=False)
        torch.testing.assert_close(made, smaller(IMAGE))


def test_a_gate_of_one_channel_ties_nothing():
    """torch_pruning alone would tie the skip to the decoder and to the gate's single channel."""
    groups = {group.name: group for group in find_groups(AttentionUnet(), [IMAGE])}
    assert set(groups["enc1.3"].slots) == {
        Slot("enc1.3", "out", 0),
        Slot("enc1.4", "out", 0),
        Slot("att1.skip.0", "in", 0),
        Slot("enc2.0", "in", 0),
        Slot("dec1.0", "in", 0),
    }
    assert Slot("dec1.0", "in", 8) in groups["up1"].slots


def test_frozen_groups_say_why():
    reasons = {group.name: group.reason for group in discover_groups(GroupNormGenerator(), [IMAGE]).frozen}
    assert "'norm3', a GroupNorm of 2 groups" in reasons["third"]
    assert "'grouped', a grouped convolution" in reasons["grouped"]
    assert "network's output" in reasons["content"]


class Shortcuts(nn.Module):
    """What a tracer cannot know: a shape written down, a learned scale, a spectral norm."""

    def __init__(self) -> None:
        super().__init__()
        self.stiff, self.scaled = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 1)
        self.normed = nn.utils.spectral_norm(nn.Conv2d(8, 8, 1))
        self.free, self.image = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 3, 1)
        self.scale = nn.Parameter(torch.ones(1, 8, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stiff(x) * torch.ones(1, 8, 1, 1)
        x = self.normed(torch.relu(self.scaled(x) * self.scale))
        return self.image(torch.relu(self.free(x)))


def test_what_breaks_when_cut_is_frozen_by_name():
    found = tried_groups(Shortcuts(), [IMAGE])
    assert [group.name for group in found.groups] == ["free"]
    reasons = {group.name: group.reason for group in found.frozen}
    assert reasons["stiff"].startswith("cutting breaks the network: ")
    assert "'scale', a parameter outside" in reasons["scaled"]
    assert "the weight of 'normed' is computed" in reasons["normed"]


class Twice(nn.Module):
    """A convolution that runs twice: the closed form knows it once."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.again = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 1)
        self.last, self.image = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.again(torch.relu(self.first(x)))
        return self.image(torch.relu(self.last(torch.relu(self.again(torch.relu(x))))))


def test_a_cost_that_is_not_the_networks_is_found():
    found = check_network(Twice(), [IMAGE])
    assert not found.passed
    assert "MACs in closed form are those counted" in [f.name for f in found.findings if f.passed is False]


class Tied(nn.Module):
    """Two convolutions with one kernel: a slice gives each its own."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.one, self.two = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1)
        self.two.weight = self.one.weight
        self.image = nn.Conv2d(8, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.image(torch.relu(self.two(torch.relu(self.one(torch.relu(self.first(x)))))))


def test_shared_weights_are_found():
    """Cutting would cost them: 139 parameters become 203 before anything is pruned."""
    findings = {finding.name: finding for finding in check_network(Tied(), [IMAGE]).findings}
    found = findings["parameters in closed form are those counted"]
    assert found.passed is False
    assert found.detail == "139 counted, 203 in closed form (shared weights?)"


class SelfAttention(nn.Module):
    """Places that look at each other, as in SAGAN, between convolutions of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.free, self.trunk = nn.Conv2d(3, 6, 1), nn.Conv2d(6, 10, 1), nn.Conv2d(10, 8, 1)
        self.query, self.key, self.value = nn.Conv2d(8, 2, 1), nn.Conv2d(8, 2, 1), nn.Conv2d(8, 5, 1)
        self.back, self.late, self.image = nn.Conv2d(5, 8, 1), nn.Conv2d(8, 7, 1), nn.Conv2d(7, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.trunk(torch.relu(self.free(torch.relu(self.enter(x)))))
        query, key, value = (layer(x).flatten(2) for layer in (self.query, self.key, self.value))
        places = torch.softmax(query.transpose(1, 2) @ key, dim=-1)
        seen = (value @ places.transpose(1, 2)).unflatten(2, x.shape[2:])
        return self.image(torch.relu(self.late(x + self.back(seen))))


def test_attention_is_left_alone_and_the_rest_is_cut():
    """torch_pruning alone follows every channel to every place: it took minutes for 8 × 8 pixels."""
    found = check_network(SelfAttention(), [IMAGE[..., :16, :16]])
    assert [group.name for group in found.groups] == ["enter", "free", "trunk", "late"]
    assert {group.name for group in found.frozen} == {"query", "key", "value", "image"}
    assert all("attention product" in group.reason for group in found.frozen if group.name != "image")
    assert found.passed


def test_a_wrong_slot_is_found(monkeypatch):
    """A tracer that forgets a reader: cutting that group alone breaks the network."""
    inputs = CASES["critic"][1]
    right = discover_groups(StridedCritic(), inputs)
    group = right.groups[1]
    slots = tuple(slot for slot in group.slots if slot.axis == "out")
    wrong = type(right)((right.groups[0], ChannelGroup(**{**vars(group), "slots": slots})), right.frozen)
    monkeypatch.setattr("gan.trial_cuts.discover_groups", lambda *_: wrong)
    found = tried_groups(StridedCritic(), inputs)
    assert [group.name for group in found.groups] == ["stem"]
    assert found.frozen[-1].name == "down"


class Constants(nn.Module):
    """A buffer that no state dict carries, and one that training must not zero."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.image = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 3, 1)
        self.register_buffer("gain", torch.tensor(2.0), persistent=False)
        self.register_buffer("shift", torch.tensor(3.0))

    def forward(self, x: Tensor) -> Tensor:
        return self.image(self.first(x)) * self.gain + self.shift


def test_buffers_of_the_networks_own_are_kept():
    network = Constants()
    slicer = Slicer(network, find_groups(network, [IMAGE]))
    state = network.state_dict()
    torch.testing.assert_close(slicer.network(state, (4,))(IMAGE), network(IMAGE))
    torch.testing.assert_close(slicer.run(state, (4,), IMAGE, training=True), network(IMAGE))


def test_a_wrong_input_is_one_sentence():
    with pytest.raises(UserError, match=r"does not run on inputs of 4x8x8 .*--input 3x64x64"):
        check_network(SeparableResnet(), [torch.zeros(1, 4, 8, 8)])


def test_narrower():
    assert [narrower(8), narrower(7), narrower(1)] == [4, 3, 1]
    assert [narrower(8, 4), narrower(12, 8), narrower(4, 4)] == [4, 8, 4]
