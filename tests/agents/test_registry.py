from __future__ import annotations

import json
import textwrap
from pathlib import Path
from typing import Any

import pytest

from agents.registry import AGENTS, RULES, build_agent, resolve_agent
from agents.sb3 import ALGORITHMS
from gan.errors import UserError
from tests.agents.conftest import Recorded

NAMES = sorted(set(AGENTS) - {"gradient"})
"""What runs on the toy environment; ``gradient`` needs networks and has its own tests of all this."""
WITH_POLICY = ("mappo", "ippo", *ALGORITHMS)


@pytest.mark.parametrize("name", NAMES)
def test_every_agent_learns_proposes_and_comes_back(name: str, recorded: Recorded, tmp_path: Path) -> None:
    env, recorder = recorded(24)
    agent = build_agent(name, seed=3)
    assert agent.name == name
    agent.learn(env)
    # a policy's last evaluation is for its proposal, and left where that is no new plan
    left = name in WITH_POLICY and env.scorer.evaluations == 23 and recorder.keys[-1] in recorder.keys[:-1]
    assert env.scorer.exhausted or name in RULES or left
    assert env.scorer.evaluations <= 24
    spent, told, best = (env.scorer.evaluations, env.scorer.requests), len(recorder.plans), env.best
    proposed = agent.propose(env)
    assert env.evaluate(proposed, counted=False).plan == proposed  # feasible
    assert (env.scorer.evaluations, env.scorer.requests) == spent
    assert (len(recorder.plans), env.best) == (told, best)

    agent.save(tmp_path / "agent")
    assert {path.suffix for path in (tmp_path / "agent").iterdir()} <= {".json", ".safetensors"}
    again = build_agent(name, seed=99)
    again.load(tmp_path / "agent")
    fresh, _ = recorded(None)
    assert again.propose(fresh) == agent.propose(fresh) == proposed


@pytest.mark.parametrize("name", NAMES)
def test_an_untrained_agent_proposes_uniform(name: str, recorded: Recorded) -> None:
    env, _ = recorded(None)
    assert build_agent(name).propose(env) == env.uniform_plan()


@pytest.mark.parametrize("name", NAMES)
def test_a_seed_fixes_every_plan(name: str, recorded: Recorded) -> None:
    asked = []
    for seed in (0, 0, 1):
        env, recorder = recorded(60)
        build_agent(name, seed).learn(env)
        asked.append(recorder.keys)
    assert asked[0] == asked[1]
    assert (asked[0] != asked[2]) or name in RULES


@pytest.mark.parametrize("name", NAMES)
def test_ranges_of_budgets(name: str, recorded: Recorded) -> None:
    env, recorder = recorded(24, budgets={"generator": "0.05:0.5"})
    agent = build_agent(name, seed=0)
    agent.learn(env)
    assert len({plan.budgets["generator"] for plan in recorder.plans}) > 1 or name in RULES
    for ratio in (0.05, 0.3):
        budgets = {"generator": ratio}
        plan = agent.propose(env, budgets)
        evaluation = env.evaluate(plan, budgets, counted=False)  # refuses a plan above its budget
        assert evaluation.budgets["generator"] == ratio
        assert sum(plan["generator"]) > 4 * 6  # and fills it: not the smallest plan
    assert agent.propose(env) == agent.propose(env, env.episode_budgets)


def test_a_range_needs_a_budget_to_propose_for(recorded: Recorded) -> None:
    env, _ = recorded(None, budgets={"generator": "0.05:0.5"})
    with pytest.raises(UserError, match="range"):
        build_agent("mappo").propose(env)


@pytest.mark.parametrize("name", sorted(set(NAMES) - set(RULES)))
def test_a_search_without_an_end_is_refused(name: str, recorded: Recorded) -> None:
    env, _ = recorded(None)
    with pytest.raises(UserError, match="evaluations"):
        build_agent(name).learn(env)


def test_former_names_still_work(recorded: Recorded, tmp_path: Path) -> None:
    assert resolve_agent("cmaes") == "cma-es"
    env, _ = recorded(24)
    agent = build_agent("cmaes")
    assert agent.name == "cma-es"
    agent.learn(env)
    agent.save(tmp_path)
    path = tmp_path / "agent.json"
    path.write_text(path.read_text().replace('"cma-es"', '"cmaes"'))
    again = build_agent("cma-es")
    again.load(tmp_path)
    assert again.propose(env) == agent.propose(env)


def test_an_unknown_name_gets_the_nearest() -> None:
    with pytest.raises(UserError, match=r"unknown agent 'mapo'.*did you mean 'mappo'"):
        build_agent("mapo")


@pytest.mark.parametrize("name", NAMES)
def test_an_unknown_option_is_refused(name: str) -> None:
    with pytest.raises(UserError, match="'warp'"):
        build_agent(name, warp=9)


@pytest.mark.parametrize("name", NAMES)
def test_damaged_or_foreign_folders_are_refused(name: str, recorded: Recorded, tmp_path: Path) -> None:
    agent = build_agent(name)
    with pytest.raises(UserError, match="holds no agent"):
        agent.load(tmp_path)
    agent.save(tmp_path)
    path = tmp_path / "agent.json"
    whole = json.loads(path.read_text())
    path.write_text(json.dumps(whole | {"agent": "somebody"}))
    with pytest.raises(UserError, match="'somebody'"):
        agent.load(tmp_path)
    path.write_text(json.dumps(whole | {"format": 99}))
    with pytest.raises(UserError, match="format"):
        agent.load(tmp_path)
    path.write_text(json.dumps(whole)[:10])
    with pytest.raises(UserError, match="damaged"):
        agent.load(tmp_path)


def test_the_example_of_contributing_is_an_agent(
    recorded: Recorded, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = (Path(__file__).parents[2] / "CONTRIBUTING.md").read_text()
    code = textwrap.dedent(text.split("   ```python\n")[1].split("   ```")[0])
    names: dict[str, Any] = {"__name__": "hill"}
    exec(compile(code, "hill.py", "exec"), names)
    monkeypatch.setitem(AGENTS, "hill", names["HillClimb"])
    env, _ = recorded(24)
    agent = build_agent("hill", seed=3, tensorboard=None)
    agent.learn(env)
    assert env.scorer.exhausted
    assert env.best is not None
    assert env.best.potential > 0
    agent.save(tmp_path)
    again = build_agent("hill", seed=9)
    again.load(tmp_path)
    assert again.propose(env) == agent.propose(env) == env.best.plan
    with pytest.raises(UserError, match="has no options"):
        build_agent("hill", sigma=1)
