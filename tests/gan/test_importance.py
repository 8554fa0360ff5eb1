from __future__ import annotations

import torch
from torch import nn

from gan.groups import find_groups
from gan.importance import l1_importance, order_of
from gan.networks import ResnetGenerator
from tests.gan.conftest import randomise


def test_importance_is_the_mean_absolute_weight_by_hand():
    network = nn.Sequential(nn.Conv2d(1, 3, 1), nn.ReLU(), nn.ConvTranspose2d(3, 2, 1), nn.Conv2d(2, 1, 1))
    with torch.no_grad():
        network[0].weight.copy_(torch.tensor([-2.0, 1.0, 3.0]).reshape(3, 1, 1, 1))
        network[2].weight.copy_(torch.tensor([[1.0, -4.0], [2.0, 0.0], [0.0, 2.0]]).reshape(3, 2, 1, 1))
    first, second = l1_importance(network, find_groups(network, [torch.zeros(1, 1, 4, 4)]))
    assert first.dtype == torch.float64
    assert first.tolist() == [2.0, 1.0, 3.0]
    assert second.tolist() == [1.0, 2.0]  # of a transposed kernel's columns: (1 + 2 + 0) / 3, (4 + 0 + 2) / 3


def test_kernels_are_averaged_not_summed():
    """So a channel does not matter more because its kernel is larger."""
    network = nn.Sequential(nn.Conv2d(2, 2, 3), nn.Conv2d(2, 1, 1))
    with torch.no_grad():
        network[0].weight.fill_(-0.5)
    (row,) = l1_importance(network, find_groups(network, [torch.zeros(1, 2, 4, 4)]))
    assert row.tolist() == [0.5, 0.5]


def test_a_tied_group_averages_all_that_make_its_channels():
    network = randomise(ResnetGenerator(3, 3, (4, 4, 6, 5, 5, 4, 4), "batch", False))
    groups = find_groups(network, [torch.zeros(1, 3, 16, 16)])
    trunk = next(i for i, group in enumerate(groups) if group.channels == 6)
    makers = [network.model[7], network.model[10].conv_block[5], network.model[11].conv_block[5]]
    wanted = sum(conv.weight.detach().double().abs().mean((1, 2, 3)) for conv in makers) / 3
    torch.testing.assert_close(l1_importance(network, groups)[trunk], wanted)


def test_dead_channels_keep_a_positive_importance():
    network = nn.Sequential(nn.Conv2d(1, 2, 1), nn.Conv2d(2, 1, 1))
    with torch.no_grad():
        network[0].weight.zero_()
    (row,) = l1_importance(network, find_groups(network, [torch.zeros(1, 1, 2, 2)]))
    assert bool((row > 0).all())


def test_the_order_is_descending_and_ties_keep_their_place():
    first, second = order_of([torch.tensor([1.0, 3.0, 2.0]), torch.ones(4)])
    assert first.tolist() == [1, 2, 0]
    assert second.tolist() == [0, 1, 2, 3]
