from __future__ import annotations

import pytest
import torch
from torch import nn

from gan.elastic import order_channels
from gan.gates import Differentiable, GatedNetwork
from gan.groups import find_groups
from gan.networks import ResnetGenerator
from gan.runtime import frozen_copy
from tests.gan.conftest import Pair, random, randomise, tiny_pairs
from tests.gan.test_scoring import scorer_of


def gates_of(widths: tuple[int, ...], channels: tuple[int, ...]) -> list[torch.Tensor]:
    return [(torch.arange(c) < w).float() for w, c in zip(widths, channels, strict=True)]


@pytest.mark.parametrize(
    ("agent", "widths"), [("generator", (4, 8, 12, 4, 8)), ("discriminator", (4, 6)), ("resnet", (4, 4, 8))]
)
def test_gates_of_ones_and_zeros_are_a_slice(agent: str, widths: tuple[int, ...], pair: Pair) -> None:
    inputs, _ = tiny_pairs(6).tensors()
    if agent == "resnet":
        network: nn.Module = randomise(ResnetGenerator(3, 3, (8, 8, 8, 8, 8, 8), "instance", False))
        groups = find_groups(network, [inputs[:1]])
        widths = tuple(4 + 4 * (i % 2) for i in range(len(groups)))
    else:
        network = {"generator": pair.generator, "discriminator": pair.discriminator}[agent]
        groups = pair.groups[agent]
    inputs = torch.cat([inputs, inputs.flip(0)], dim=1) if agent == "discriminator" else inputs
    elastic = order_channels(network, groups)
    gated = GatedNetwork(elastic)
    expected = elastic.slicer.run(elastic.tensors, widths, inputs, training=True)
    torch.testing.assert_close(
        gated(inputs, gates_of(widths, gated.channels)), expected, rtol=1e-4, atol=1e-5
    )
    full = elastic.slicer.run(elastic.tensors, gated.channels, inputs, training=True)
    torch.testing.assert_close(gated(inputs), full, rtol=1e-4, atol=1e-5)


def test_gradients_reach_every_gate_and_no_weight(pair: Pair) -> None:
    inputs, _ = tiny_pairs(6).tensors()
    elastic = order_channels(pair.generator, pair.groups["generator"])
    before = {name: tensor.clone() for name, tensor in elastic.tensors.items()}
    gated = GatedNetwork(elastic)
    gates = [torch.rand(c, generator=random()).requires_grad_() for c in gated.channels]
    gated(inputs, gates).square().mean().backward()
    assert all(gate.grad is not None and bool((gate.grad != 0).any()) for gate in gates)
    assert all(torch.equal(tensor, before[name]) for name, tensor in elastic.tensors.items())
    assert not any(tensor.requires_grad for tensor in elastic.tensors.values())


def test_gates_of_another_network_are_refused(pair: Pair) -> None:
    gated = GatedNetwork(order_channels(pair.generator, pair.groups["generator"]))
    with pytest.raises(ValueError, match="gates are for"):
        gated(tiny_pairs(2).tensors()[0], [torch.ones(3)])


def test_a_scorer_hands_out_what_it_scores_with(pair: Pair) -> None:
    scorer = scorer_of(pair)
    assert isinstance(scorer, Differentiable)
    gated = scorer.gated()
    assert torch.equal(gated.inputs, scorer.yardstick.inputs)
    assert torch.equal(gated.condition, gated.inputs)  # this discriminator sees input and image
    assert torch.equal(gated.outputs, frozen_copy(pair.generator, amp=False)(gated.inputs))
    assert gated.neighbours.shape == (len(gated.inputs), 7)
    assert gated.generator.channels == (8, 12, 16, 12, 8)
    assert gated.discriminator.channels == (8, 12)
