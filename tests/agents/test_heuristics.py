from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from agents.heuristics import threshold_proportions
from agents.registry import build_agent
from envs.budget import allowed_cost, keep_ratio
from envs.toy import toy_network
from gan.errors import UserError
from gan.evaluations import PrunableNetwork
from tests.agents.conftest import Recorded


def test_uniform_scores_its_one_plan(recorded: Recorded) -> None:
    env, recorder = recorded(24)
    build_agent("uniform").learn(env)
    assert [evaluation.plan for evaluation in recorder.plans] == [env.uniform_plan()]
    assert recorder.plans[0].potential == 0.0


def test_random_proposes_the_best_plan_it_saw(recorded: Recorded) -> None:
    env, recorder = recorded(40)
    agent = build_agent("random", seed=1)
    agent.learn(env)
    best = max(recorder.plans, key=lambda evaluation: evaluation.potential)
    assert agent.propose(env) == best.plan


def test_random_strays_as_far_as_its_sigma(recorded: Recorded) -> None:
    def spread(**options: float) -> float:
        env, recorder = recorded(40)
        build_agent("random", **options).learn(env)
        uniform = np.log(env.uniform_plan()["generator"])
        return float(np.mean([np.std(np.log(e.plan["generator"]) - uniform) for e in recorder.plans]))

    near = spread(smallest_sigma=0.1, largest_sigma=0.1)
    far = spread(smallest_sigma=1.0, largest_sigma=1.0)
    assert near < 0.3 < far


def magnitude_network(*rows: list[float]) -> PrunableNetwork:
    """One multiple is one channel."""
    network = toy_network("generator", [len(row) for row in rows], multiple=1)
    return replace(network, importance=tuple(np.array(row) for row in rows))


def test_one_threshold_for_all_channels() -> None:
    network = magnitude_network([9.0, 8.0, 7.0, 1.0], [6.0, 5.0, 0.5, 0.4])
    budget = keep_ratio(network, np.array([3, 1]))
    assert threshold_proportions(network, budget, by_group=False).tolist() == [0.75, 0.25]  # above 6 or at it
    # means are 6.25 and 2.975: 1.44 1.28 1.12 0.16 and 2.02 1.68 0.17 0.13
    budget = keep_ratio(network, np.array([1, 2]))
    assert threshold_proportions(network, budget, by_group=True).tolist() == [0.25, 0.5]


def test_the_threshold_meets_the_budget_and_is_the_smallest_that_does() -> None:
    network = magnitude_network([9.0, 8.0, 7.0, 1.0], [6.0, 5.0, 0.5, 0.4])
    for budget in np.linspace(0.25, 1.0, 16):
        kept = threshold_proportions(network, float(budget), by_group=False) * 4
        assert network.cost_of(kept) <= allowed_cost(network, float(budget))
    assert threshold_proportions(network, 1.0, by_group=False).tolist() == [1.0, 1.0]


def test_a_group_below_the_threshold_keeps_a_channel() -> None:
    network = magnitude_network([9.0, 8.0, 7.0, 6.0], [0.4, 0.3, 0.2, 0.1])
    budget = keep_ratio(network, np.array([4, 1]))
    assert threshold_proportions(network, budget, by_group=False).tolist() == [1.0, 0.25]


def test_magnitude_scores_its_plan_and_the_scale_comes_back(recorded: Recorded, tmp_path: Path) -> None:
    env, recorder = recorded(24)
    agent = build_agent("magnitude", scale="none")
    agent.learn(env)
    assert [evaluation.plan for evaluation in recorder.plans] == [agent.propose(env)]
    agent.save(tmp_path)
    again = build_agent("magnitude")
    again.load(tmp_path)
    assert again.options.scale == "none"
    with pytest.raises(UserError, match="unknown scale 'big'"):
        build_agent("magnitude", scale="big")


def test_magnitude_needs_importance() -> None:
    network = replace(toy_network("generator", [8, 8]), importance=())
    with pytest.raises(UserError, match="carries no importance"):
        threshold_proportions(network, 0.5, by_group=True)


def test_impossible_sigmas_are_refused() -> None:
    with pytest.raises(UserError, match="smallest_sigma"):
        build_agent("random", smallest_sigma=2.0)


def test_random_refuses_a_plan_of_other_networks(recorded: Recorded, tmp_path: Path) -> None:
    env, _ = recorded(10)
    agent = build_agent("random")
    agent.learn(env)
    agent.save(tmp_path)
    path = tmp_path / "agent.json"
    content = json.loads(path.read_text())
    content["proportions"]["generator"].pop()
    path.write_text(json.dumps(content))
    agent.load(tmp_path)
    with pytest.raises(UserError, match="groups"):
        agent.propose(env)
    del content["proportions"]
    path.write_text(json.dumps(content))
    with pytest.raises(UserError, match="no plan"):
        agent.load(tmp_path)
