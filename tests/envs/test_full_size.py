"""Networks of the size that people train: groups, projection, an episode, slices, export, at 256 × 256."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import envs.references
from envs.budget import Budget, uniform_widths
from envs.pruning_env import PruningEnv
from gan.cost import build_cost_model
from gan.data import PairedImages, to_uint8
from gan.evaluation import count
from gan.evaluations import CountedScorer, PrunableNetwork
from gan.export import export_onnx
from gan.groups import find_groups
from gan.networks import Architecture, initialise
from gan.slicing import Slicer
from gan.tasks import Task

pytestmark = pytest.mark.slow

SIZE = 256
UNET = Architecture("unet_256", norm="batch")
RESNET = Architecture("resnet_9blocks", norm="instance")
PATCH = Architecture("basic", in_channels=6, out_channels=1)
PUBLISHED = (
    (UNET, 15, 54.41e6, 6.05e9, 256),
    (RESNET, 14, 11.38e6, 49.55e9, 4),
    (PATCH, 4, 2.77e6, 3.197e9, 256),
)
"""Architecture, channel groups, parameters, MACs, and the step of the sizes that its ONNX file says."""


def pictures(images: int, seed: int = 0) -> PairedImages:
    """Smooth random pictures and their negatives."""
    coarse = torch.randn(images, 3, 12, 12, generator=torch.Generator().manual_seed(seed))
    inputs = F.interpolate(coarse, size=SIZE, mode="bicubic").clamp(-1, 1)
    return PairedImages(to_uint8(inputs), to_uint8(-inputs), tuple(f"{seed}-{i}" for i in range(images)))


def build(architecture: Architecture) -> torch.nn.Module:
    return initialise(architecture.build(), torch.Generator().manual_seed(0)).eval().requires_grad_(False)


@pytest.mark.parametrize(
    ("architecture", "groups", "params", "macs", "step"), PUBLISHED, ids=[row[0].name for row in PUBLISHED]
)
def test_groups_projection_slices_and_export(
    architecture: Architecture, groups: int, params: float, macs: float, step: int, tmp_path: Path
) -> None:
    network = build(architecture)
    pairs = pictures(2).tensors()
    images: Tensor = pairs[0] if architecture.is_generator else torch.cat(pairs, 1)
    found = find_groups(network, [images[:1]])
    cost = build_cost_model(network, found, [images[:1]])
    assert len(found) == groups
    assert float(cost.params(cost.dense)) == pytest.approx(params, rel=2e-3)
    assert float(cost.macs(cost.dense)) == pytest.approx(macs, rel=2e-3)

    prunable = PrunableNetwork("generator", found, 8, cost, "macs", ())
    slicer = Slicer(network, found)
    for share in (0.25, 0.1):
        widths = uniform_widths(prunable, share)
        assert (widths % 8 == 0).all()
        assert 0.9 * share < float(cost.macs(widths) / cost.macs(cost.dense)) <= share
        slice_ = slicer.network(network.state_dict(), widths.tolist())
        assert count(slice_, [images[:1]]) == (int(cost.macs(widths)), int(cost.params(widths)))
        parity = export_onnx(tmp_path / f"{share}.onnx", slice_, images)
        assert parity.max_difference < 1e-4
        assert parity.size_multiple == step
    assert (tmp_path / "0.1.onnx").stat().st_size < (tmp_path / "0.25.onnx").stat().st_size


@pytest.mark.parametrize("architecture", [UNET, RESNET], ids=lambda one: one.name)
def test_an_episode(architecture: Architecture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(envs.references, "SPREAD_PLANS", 3)
    networks = {"generator": build(architecture), "discriminator": build(PATCH)}
    example = torch.zeros(1, 3, SIZE, SIZE)
    seen = {"generator": example, "discriminator": torch.cat([example, example], 1)}
    task = Task(
        name="full-size",
        networks=networks,
        architectures={"generator": architecture, "discriminator": PATCH},
        groups={agent: find_groups(network, [seen[agent]]) for agent, network in networks.items()},
        train=pictures(2, seed=1),
        val=pictures(9),
        test=pictures(9, seed=2),
        multiples={"generator": 8, "discriminator": 4},
        elastic_path=None,
    )
    scorer = task.scorer("macs", "dense", statistics_images=2)
    budgets = {"generator": Budget.of(0.1), "discriminator": Budget.of(0.5)}
    env = PruningEnv(CountedScorer(scorer, limit=1), budgets, reward="final")
    env.reset(seed=0)
    random = np.random.default_rng(0)
    rewards: dict[str, float] = {}
    steps = 0
    while env.agents:
        actions = {agent: random.uniform(-1, 1, 1).astype(np.float32) for agent in env.agents}
        observations, rewards, terminated, _, _ = env.step(actions)
        assert all(np.isfinite(row).all() for row in observations.values())
        steps += 1
    assert all(terminated.values())
    assert steps == len(task.groups["generator"]) - 1
    assert all(np.isfinite(reward) for reward in rewards.values())
    assert env.best is not None
    for agent, budget in (("generator", 0.1), ("discriminator", 0.5)):
        model = task.cost_model(agent)
        widths = np.array(env.best.plan[agent])
        assert 0.9 * budget < float(model.macs(widths) / model.macs(model.dense)) <= budget
