from __future__ import annotations

import copy

import torch
from torch import Tensor

from gan.checkpoints import state_hash
from gan.feature_critic import STAGES, FeatureCritic
from gan.loop import LoopOptions
from tests.gan.conftest import random

CPU = torch.device("cpu")


def critic(jitter: float = 0.0) -> FeatureCritic:
    return FeatureCritic(LoopOptions(jitter=jitter), random(0), CPU)


def striped(count: int = 8, seed: int = 0) -> Tensor:
    """Rows of one random colour each."""
    return (2 * torch.rand(count, 3, 32, 1, generator=random(seed)) - 1).expand(-1, -1, -1, 32).clone()


def upright(count: int = 8, seed: int = 1) -> Tensor:
    """The same with columns: nothing but the direction tells them apart."""
    return striped(count, seed).transpose(-1, -2).contiguous()


def test_it_learns_to_tell_images_apart() -> None:
    judge = critic()
    first = float(judge.learn(striped(), upright(), 5e-3))
    for step in range(30):
        last = float(judge.learn(striped(seed=2 * step), upright(seed=2 * step + 1), 5e-3))
    assert last < 0.5 * first
    unseen = judge.fooled(upright(seed=99)), judge.fooled(striped(seed=98))
    assert unseen[0] > unseen[1] + 0.5  # images that were called made fool it less


def test_gradients_reach_the_images_alone() -> None:
    judge = critic(jitter=0.2)
    before = [parameter.detach().clone() for parameter in judge.network.parameters()]
    images = upright().requires_grad_()
    judge.fooled(images).backward()
    assert images.grad is not None
    assert images.grad.abs().sum() > 0
    assert all(parameter.grad is None for parameter in judge.network.parameters())
    assert all(map(torch.equal, before, judge.network.parameters()))


def test_the_eyes_stay_as_they_are_and_every_stage_is_judged() -> None:
    judge = critic()
    before = state_hash(judge.stages)
    judge.learn(striped(), upright(), 1e-3)
    assert state_hash(judge.stages) == before
    with torch.no_grad():
        sizes = [logits.shape[-1] for logits in judge.network(judge.stages(striped()))]
    assert sizes == [24, 12, 6]
    assert len(sizes) == len(STAGES)


def test_two_begin_alike_and_leave_the_global_generator_alone() -> None:
    state = torch.get_rng_state()
    assert state_hash(critic().network) == state_hash(critic().network)
    assert torch.equal(torch.get_rng_state(), state)
    other = FeatureCritic(LoopOptions(seed=1), random(0), CPU)
    assert state_hash(other.network) != state_hash(critic().network)


def test_a_restored_one_goes_on_alike() -> None:
    one, other = critic(), critic()
    one.learn(striped(), upright(), 1e-3)
    other.load_state_dict(copy.deepcopy(one.state_dict()))
    lost = [float(each.learn(striped(seed=4), upright(seed=5), 1e-3)) for each in (one, other)]
    assert lost[0] == lost[1]
    assert state_hash(one.network) == state_hash(other.network)
