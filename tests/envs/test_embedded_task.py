"""An episode on the embedded task: the real scorer behind the environment."""

from __future__ import annotations

import numpy as np
import pytest

from envs.budget import default_budgets
from envs.pruning_env import PruningEnv
from envs.toy import toy_env
from gan.checkpoints import state_hash, tensors_hash
from gan.evaluations import CountedScorer
from gan.scoring import Scorer
from gan.tasks import AGENTS, load_task


@pytest.fixture(scope="module")
def scorer() -> Scorer:
    return load_task().scorer(start="dense", probe=12, statistics_images=8)


@pytest.fixture(scope="module")
def env(scorer: Scorer) -> PruningEnv:
    env = PruningEnv(CountedScorer(scorer), default_budgets(AGENTS))
    env.prepare()
    return env


def test_an_episode_changes_no_weights(env: PruningEnv, scorer: Scorer) -> None:
    task = load_task()
    held = {agent: scorer.elastic(agent).tensors for agent in AGENTS}
    before = [state_hash(task.networks[agent]) for agent in AGENTS]
    before += [tensors_hash(held[agent]) for agent in AGENTS]
    random = np.random.default_rng(0)
    env.reset(seed=0)
    total = 0.0
    while env.agents:
        actions = {agent: random.uniform(-1, 1, 1).astype(np.float32) for agent in env.agents}
        _, rewards, *_, infos = env.step(actions)
        total += rewards["generator"]
    assert total == pytest.approx(infos["generator"]["potential"], abs=1e-9)
    after = [state_hash(task.networks[agent]) for agent in AGENTS]
    assert before == after + [tensors_hash(held[agent]) for agent in AGENTS]


def test_uniform_pruning_returns_zero(env: PruningEnv) -> None:
    env.reset(seed=0)
    while env.agents:
        _, rewards, *_ = env.step({agent: np.zeros(1, np.float32) for agent in env.agents})
        assert rewards == {"generator": 0.0, "discriminator": 0.0}


def test_spaces_are_those_of_any_other_network(env: PruningEnv) -> None:
    toy = toy_env()
    assert env.state_space == toy.state_space
    for agent in AGENTS:
        assert env.observation_space(agent) == toy.observation_space(agent)
        assert env.action_space(agent) == toy.action_space(agent)


def test_every_plan_of_an_episode_meets_its_budget(env: PruningEnv) -> None:
    env.reset(seed=1)
    while env.agents:
        env.step({agent: np.ones(1, np.float32) for agent in env.agents})
        for agent, network in env.scorer.networks.items():
            widths = np.array(env.plan[agent])
            kept = network.cost_of(widths) / network.cost_of(network.channels)
            assert kept <= env.budgets[agent].high + 1e-12
