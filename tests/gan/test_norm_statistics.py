from __future__ import annotations

import pytest
import torch
from torch import nn

from gan.checkpoints import state_hash
from gan.norm_statistics import cumulative_statistics, recompute_statistics
from tests.gan.conftest import random, tiny_generator, tiny_pairs


def test_statistics_by_hand():
    network = nn.Sequential(nn.BatchNorm2d(1))
    recompute_statistics(network, torch.tensor([1.0, 2.0, 6.0]).reshape(3, 1, 1, 1), batch_size=3)
    assert network[0].running_mean.item() == pytest.approx(3.0)
    assert network[0].running_var.item() == pytest.approx((4 + 1 + 9) / 2)  # unbiased, as torch keeps it


def test_batches_are_averaged_and_nothing_is_left_of_the_old():
    network = nn.Sequential(nn.BatchNorm2d(1))
    network[0].running_mean.fill_(1e6)
    images = torch.tensor([1.0, 3.0, 10.0, 30.0, 4.0, 8.0]).reshape(6, 1, 1, 1)
    recompute_statistics(network, images, batch_size=2)
    assert network[0].running_mean.item() == pytest.approx((2 + 20 + 6) / 3)
    assert network[0].running_var.item() == pytest.approx((2 + 200 + 8) / 3)


def test_only_buffers_change_and_repeating_changes_nothing():
    network, inputs = tiny_generator(), tiny_pairs(12).tensors()[0]
    parameters = {name: value.clone() for name, value in network.named_parameters()}
    before = state_hash(network)
    once = state_hash(recompute_statistics(network, inputs))
    assert once != before
    assert state_hash(recompute_statistics(network, inputs)) == once
    for name, value in network.named_parameters():
        assert torch.equal(value, parameters[name])


def test_the_network_behaves_on_these_images_as_in_training():
    """In one batch; torch normalises by the biased variance in training and keeps the unbiased one."""
    network, inputs = tiny_generator(), tiny_pairs(24).tensors()[0]
    recompute_statistics(network, inputs)
    with torch.no_grad():
        made = network(inputs)
        batch = network.train()(inputs)
        before = tiny_generator()(inputs)
    assert float((made - batch).abs().mean()) < 0.02
    assert float((made - before).abs().mean()) > 0.05


def test_the_network_is_left_in_evaluation_mode_with_its_own_momentum():
    network = tiny_generator().train()
    norms = [module for module in network.modules() if isinstance(module, nn.BatchNorm2d)]
    norms[0].momentum = 0.3
    recompute_statistics(network, tiny_pairs(4).tensors()[0])
    assert [norm.momentum for norm in norms] == [0.3] + [0.1] * (len(norms) - 1)
    assert not any(module.training for module in network.modules())


def test_an_error_inside_leaves_no_trace_of_the_mode():
    network = tiny_generator()
    with pytest.raises(RuntimeError, match="stop"), cumulative_statistics(network):
        raise RuntimeError("stop")
    norms = [module for module in network.modules() if isinstance(module, nn.BatchNorm2d)]
    assert {norm.momentum for norm in norms} == {0.1}
    assert not any(norm.training for norm in norms)


def test_dropout_is_off_and_gradients_too():
    network = nn.Sequential(nn.Dropout(0.5), nn.Conv2d(1, 1, 1), nn.BatchNorm2d(1)).train()
    images = torch.randn(64, 1, 2, 2, generator=random())
    with cumulative_statistics(network):
        made = network(images)
    assert not made.requires_grad
    with torch.no_grad():
        wanted = network[1](images).mean()  # with dropout the mean would be another one
    torch.testing.assert_close(network[2].running_mean, wanted[None])


def test_a_network_without_batch_norm_is_unchanged():
    network = nn.Sequential(nn.Conv2d(3, 3, 1), nn.InstanceNorm2d(3))
    before = state_hash(network)
    recompute_statistics(network, torch.zeros(2, 3, 4, 4))
    assert state_hash(network) == before


def test_networks_without_batch_norm_are_not_even_run():
    class Silent(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            raise AssertionError("it ran")

    network = nn.Sequential(nn.InstanceNorm2d(3), Silent()).train()
    assert recompute_statistics(network, torch.zeros(4, 3, 2, 2)) is network
    assert not network.training
