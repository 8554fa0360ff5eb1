from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from agents.registry import build_agent
from gan.errors import UserError
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
