from __future__ import annotations

import functools
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

from gan.checkpoints import tensors_hash
from gan.groups import ChannelGroup, find_groups
from gan.networks import Architecture
from gan.slicing import Slicer
from tests.gan.conftest import random, randomise, tiny_generator

NORMS = (nn.BatchNorm2d, nn.InstanceNorm2d)
CASES = {
    "unet batch": (Architecture("unet_64", base_width=4), 64),
    "unet instance": (Architecture("unet_64", base_width=4, norm="instance"), 64),
    "resnet batch": (Architecture("resnet_6blocks", base_width=4, dropout=True), 16),
    "resnet instance": (Architecture("resnet_6blocks", base_width=4, norm="instance"), 16),
    "patch batch": (Architecture("basic", 6, 1, base_width=4), 48),
    "patch instance": (Architecture("basic", 6, 1, base_width=4, norm="instance"), 48),
    "pixel batch": (Architecture("pixel", 6, 1, base_width=4), 8),
}


@dataclass(frozen=True)
class Case:
    architecture: Architecture
    network: nn.Module
    groups: tuple[ChannelGroup, ...]
    slicer: Slicer
    inputs: Tensor

    @property
    def state(self) -> dict[str, Tensor]:
        return self.network.state_dict()

    def widths(self, seed: int = 0) -> tuple[int, ...]:
        """Random, from 1 to all."""
        draws = random(seed)
        return tuple(int(torch.randint(1, g.channels + 1, (), generator=draws)) for g in self.groups)

    def orders(self, seed: int = 0) -> list[Tensor]:
        draws = random(seed)
        return [torch.randperm(group.channels, generator=draws) for group in self.groups]


@functools.cache
def prepared(name: str) -> Case:
    architecture, size = CASES[name]
    network = randomise(architecture.build()).requires_grad_(False).double()  # so that equal means equal
    inputs = torch.randn(2, architecture.in_channels, size, size, generator=random(), dtype=torch.float64)
    groups = find_groups(network, [inputs[:1]])
    return Case(architecture, network, groups, Slicer(network, groups), inputs)


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> Case:
    """One network; tests leave it as it is."""
    return prepared(request.param)


@pytest.fixture
def unet() -> Case:
    return prepared("unet batch")


def test_keeping_all_gives_the_dense_outputs(case):
    wanted = case.network(case.inputs)
    widths = case.slicer.dense_widths
    assert torch.equal(case.slicer.network(case.state, widths)(case.inputs), wanted)
    assert torch.equal(case.slicer.network(case.state, widths, shared=True)(case.inputs), wanted)
    assert torch.equal(case.slicer.run(case.state, widths, case.inputs, training=False), wanted)


def test_permuting_keeps_the_function(case):
    orders = case.orders()
    moved = case.slicer.permuted(case.state, orders)
    assert moved.keys() == case.state.keys()
    assert tensors_hash(moved) != tensors_hash(case.state)
    torch.testing.assert_close(
        case.slicer.network(moved, case.slicer.dense_widths)(case.inputs), case.network(case.inputs)
    )
    back = case.slicer.permuted(moved, [torch.argsort(order) for order in orders])
    assert tensors_hash(back) == tensors_hash(case.state)


def masked(case: Case, kept: list[Tensor]) -> Tensor:
    """The full network with all other channels set to zero behind their norms."""
    hooks = []
    for group, indices in zip(case.groups, kept, strict=True):
        made = [slot for slot in group.slots if slot.axis == "out"]
        norms = [slot for slot in made if isinstance(case.network.get_submodule(slot.module), NORMS)]
        for slot in norms or made:
            mask = torch.zeros(group.channels)
            mask[indices] = 1

            def cut(_module: nn.Module, _args: object, out: Tensor, mask: Tensor = mask) -> Tensor:
                return out * mask[:, None, None]

            hooks.append(case.network.get_submodule(slot.module).register_forward_hook(cut))
    try:
        return case.network(case.inputs)
    finally:
        for hook in hooks:
            hook.remove()


@pytest.mark.parametrize("seed", range(3))
def test_a_slice_equals_the_masked_network(case, seed):
    widths, orders = case.widths(seed), case.orders(seed)
    moved = case.slicer.permuted(case.state, orders)
    wanted = masked(case, [order[:width] for order, width in zip(orders, widths, strict=True)])
    assert not torch.allclose(wanted, case.network(case.inputs), atol=1e-3)
    torch.testing.assert_close(case.slicer.network(moved, widths)(case.inputs), wanted)
    torch.testing.assert_close(case.slicer.run(moved, widths, case.inputs, training=False), wanted)


def test_a_slice_is_a_network_of_these_widths(case):
    """So a recipe with the widths rebuilds it, and it costs what it weighs."""
    widths = case.widths(3)
    sliced = case.slicer.network(case.state, widths)
    built = case.architecture.pruned(widths).build().double().eval()
    built.load_state_dict(sliced.state_dict())
    assert torch.equal(built(case.inputs), sliced(case.inputs))
    for (_, found), (name, wanted) in zip(sliced.named_modules(), built.named_modules(), strict=True):
        for attribute in ("in_channels", "out_channels", "num_features", "groups"):
            assert getattr(found, attribute, None) == getattr(wanted, attribute, None), (name, attribute)


def test_a_slice_keeps_a_prefix_and_joins_at_concatenations():
    network = tiny_generator()
    slicer = Slicer(network, find_groups(network, [torch.zeros(1, 3, 8, 8)]))
    state = network.state_dict()
    sliced = slicer.narrow(state, (5, 3, 4, 2, 6))
    first = "model.model.0.weight"
    assert torch.equal(sliced[first], state[first][:5])
    joined = "model.model.3.weight"  # reads 8 channels of the skip, then 8 of the level below
    assert torch.equal(sliced[joined], torch.cat([state[joined][:5], state[joined][8:14]]))
    inner = "model.model.1.model.5.weight"
    assert torch.equal(sliced[inner], torch.cat([state[inner][:3], state[inner][12:14]])[:, :6])
    norm = "model.model.1.model.6.running_var"
    assert torch.equal(sliced[norm], state[norm][:6])


def test_training_sends_gradients_to_the_shared_tensors(unet):
    tensors = {
        name: value.clone().requires_grad_(value.is_floating_point() and "running" not in name)
        for name, value in unet.state.items()
    }
    before = tensors_hash(tensors)
    widths = tuple(max(1, width // 2) for width in unet.slicer.dense_widths)
    made = unet.slicer.run(tensors, widths, unet.inputs, training=True)
    made.square().mean().backward()
    assert tensors_hash(tensors) == before  # the running statistics too
    for name, value in tensors.items():
        if value.requires_grad:
            assert value.grad is not None, name
    first = tensors["model.model.0.weight"].grad
    assert float(first[: widths[0]].abs().sum()) > 0
    assert float(first[widths[0] :].abs().sum()) == 0


def test_training_normalises_by_the_batch(unet):
    widths = unet.widths(4)
    own = unet.slicer.network(unet.state, widths).train()
    with torch.no_grad():
        wanted = own(unet.inputs)
        found = unet.slicer.run(unet.state, widths, unet.inputs, training=True)
    torch.testing.assert_close(found, wanted)
    evaluated = unet.slicer.run(unet.state, widths, unet.inputs, training=False)
    assert not torch.allclose(found, evaluated, atol=1e-3)


def test_dropout_is_on_in_training_only():
    case = prepared("resnet batch")
    first, second = (case.slicer.run(case.state, case.widths(), case.inputs, training=True) for _ in range(2))
    assert not torch.equal(first, second)
    first, second = (
        case.slicer.run(case.state, case.widths(), case.inputs, training=False) for _ in range(2)
    )
    assert torch.equal(first, second)


def pointers(tensors: dict[str, Tensor]) -> set[int]:
    return {value.untyped_storage().data_ptr() for value in tensors.values()}


def test_a_shared_slice_holds_no_kernels_of_its_own():
    state = prepared("patch batch").state
    sliced = prepared("patch batch").slicer.network(state, (2, 3, 4, 5), shared=True)
    assert pointers(dict(sliced.named_parameters())) <= pointers(state)
    assert not pointers(dict(sliced.named_buffers())) & pointers(state)  # statistics are recomputed in place
    assert not any(p.requires_grad for p in sliced.parameters())


@pytest.mark.parametrize("widths", [(2, 3, 4, 5), (4, 8, 16, 32)])
def test_a_stand_alone_slice_shares_nothing(widths):
    case = prepared("patch batch")
    case.network.requires_grad_(True)
    try:
        slicer = Slicer(case.network, case.groups)
    finally:
        case.network.requires_grad_(False)
    state = {name: value.clone() for name, value in case.state.items()}
    before = tensors_hash(state)
    sliced = slicer.network(state, widths)
    assert not pointers(sliced.state_dict()) & pointers(state)
    assert all(p.requires_grad and p.is_leaf and p.is_contiguous() for p in sliced.parameters())
    sliced.train()(case.inputs).square().mean().backward()
    torch.optim.SGD(sliced.parameters(), lr=1.0).step()
    assert tensors_hash(state) == before


def test_a_slice_comes_in_evaluation_mode(unet):
    unet.slicer.run(unet.state, unet.widths(), unet.inputs, training=True)  # leaves its skeleton in training
    assert not any(module.training for module in unet.slicer.network(unet.state, unet.widths()).modules())


def test_slices_do_not_depend_on_those_before(unet):
    wide, narrow = unet.slicer.dense_widths, (1,) * len(unet.groups)
    first = unet.slicer.run(unet.state, wide, unet.inputs, training=False)
    kept = unet.slicer.network(unet.state, wide)
    unet.slicer.run(unet.state, narrow, unet.inputs, training=True)
    assert torch.equal(unet.slicer.run(unet.state, wide, unet.inputs, training=False), first)
    assert torch.equal(kept(unet.inputs), first)


def test_the_network_is_neither_changed_nor_kept():
    network = tiny_generator()
    network.model.model[2].inplace = True
    before = tensors_hash(network.state_dict())
    slicer = Slicer(network, find_groups(network, [torch.zeros(1, 3, 8, 8)]))
    assert network.model.model[2].inplace
    assert all(p.device.type == "cpu" for p in network.parameters())
    state = {name: value.clone() for name, value in network.state_dict().items()}
    sliced = slicer.network(state, slicer.dense_widths)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.zero_()
    assert tensors_hash(sliced.state_dict()) == before


@pytest.mark.parametrize(
    ("widths", "sentence"),
    [
        ((8, 12, 16, 12), "got 4 widths for 5 channel groups"),
        ((8, 12, 16, 12, 8, 8), "got 6 widths for 5 channel groups"),
        ((8, 12, 0, 12, 8), "model.3.model.1 keeps 0 channels; allowed are 1 to 16"),
        ((9, 12, 16, 12, 8), "model.model.0 keeps 9 channels; allowed are 1 to 8"),
        ((8, -1, 16, 12, 8), "keeps -1 channels; allowed are 1 to 12"),
    ],
)
def test_wrong_widths_are_refused(widths, sentence):
    network = tiny_generator()
    slicer = Slicer(network, find_groups(network, [torch.zeros(1, 3, 8, 8)]))
    with pytest.raises(ValueError, match=sentence):
        slicer.network(network.state_dict(), widths)
    with pytest.raises(ValueError, match=sentence):
        slicer.run(network.state_dict(), widths, torch.zeros(1, 3, 8, 8), training=False)
