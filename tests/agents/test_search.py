from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from agents.registry import build_agent
from agents.search import CmaStrategy, Coordinates, PlusStrategy
from agents.tpe import ParzenEstimator, TpeOptions
from envs.budget import Budget
from envs.pruning_env import PruningEnv
from envs.toy import ToyScorer, toy_env, toy_network, toy_optimum
from gan.errors import UserError
from gan.evaluations import CountedScorer, EvaluationLog
from tests.agents.conftest import Recorded, Recorder

SEARCHES = ("cma-es", "evolution", "tpe")


def best_of(name: str, seed: int, evaluations: int, **options: Any) -> float:
    env = toy_env(evaluations)
    build_agent(name, seed, **options).learn(env)
    assert env.scorer.evaluations == evaluations  # all of them, and none beyond
    assert env.best is not None
    return env.best.potential


@pytest.mark.parametrize("name", SEARCHES)
def test_it_beats_random_search_at_equal_evaluations(name: str) -> None:
    found = [best_of(name, seed, 80) for seed in range(5)]
    random = [best_of("random", seed, 80) for seed in range(5)]
    assert np.mean(found) > np.mean(random)
    assert min(found) > np.median(random)


def test_cmaes_comes_near_the_optimum() -> None:
    optimum = toy_optimum(toy_env()).potential
    assert best_of("cma-es", 0, 250) > 0.95 * optimum


def small_env(evaluations: int, *channels: int) -> tuple[PruningEnv, Recorder]:
    """A generator of narrow groups and a discriminator of one: few plans, or a single one."""
    networks = {
        "generator": toy_network("generator", channels),
        "discriminator": toy_network("discriminator", (16,)),
    }
    shapes = {"generator": [1.0, 3.0, 1.0, 1.0][: len(channels)], "discriminator": [1.0]}
    budgets = dict.fromkeys(networks, 0.5)
    recorder = Recorder()
    scorer = CountedScorer(ToyScorer(networks, shapes, budgets), None, evaluations)
    return PruningEnv(scorer, {agent: Budget.of(0.5) for agent in networks}, listener=recorder), recorder


@pytest.mark.parametrize("name", SEARCHES)
@pytest.mark.parametrize("channels", [(8, 8), (8, 12, 8)])
def test_a_space_of_few_plans_ends_at_four_requests_an_evaluation(
    name: str, channels: tuple[int, ...]
) -> None:
    env, recorder = small_env(50, *channels)
    build_agent(name).learn(env)
    assert env.scorer.evaluations < 50
    assert env.scorer.requests == len(recorder.plans) == 200


@pytest.mark.parametrize("name", SEARCHES)
def test_it_ends_in_the_middle_of_a_generation(name: str, recorded: Recorded) -> None:
    env, recorder = recorded(3)
    build_agent(name).learn(env)
    assert len(recorder.plans) == env.scorer.evaluations == 3


@pytest.mark.parametrize("name", SEARCHES)
def test_nothing_global_is_random(name: str, recorded: Recorded) -> None:
    np.random.seed(5)  # noqa: NPY002 - the generator that must not be touched
    before = np.random.get_state()[1]  # noqa: NPY002
    asked = []
    for _ in range(2):
        env, recorder = recorded(60)
        build_agent(name, seed=2).learn(env)
        asked.append(recorder.keys)
        assert np.array_equal(np.random.get_state()[1], before)  # noqa: NPY002
        np.random.rand(7)  # noqa: NPY002 - and must not matter
        before = np.random.get_state()[1]  # noqa: NPY002
    assert asked[0] == asked[1]


def test_cma_reads_and_writes_no_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The package takes options from a file in the working directory, and writes logs there, unless told."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "cma_signals.in").write_text("{'timeout': 0}")
    strategy = CmaStrategy(np.zeros(3), 0.3, 6, np.random.default_rng(0))
    for _ in range(3):
        points = strategy.ask()
        strategy.tell(points, -(points**2).sum(1))
    assert not strategy.finished
    assert [path.name for path in tmp_path.iterdir()] == ["cma_signals.in"]


@pytest.mark.parametrize("name", SEARCHES)
def test_an_interrupted_search_goes_on_from_its_log(name: str, tmp_path: Path) -> None:
    def search(path: Path, evaluations: int) -> list[str]:
        fingerprint = toy_env().scorer.scorer.fingerprint
        recorder = Recorder()
        env = toy_env(evaluations, log=EvaluationLog(path, fingerprint), listener=recorder)
        build_agent(name).learn(env)
        assert env.scorer.replay_left is None
        return recorder.keys

    whole = search(tmp_path / "whole.jsonl", 50)
    search(tmp_path / "torn.jsonl", 23)
    assert search(tmp_path / "torn.jsonl", 50) == whole


@pytest.mark.parametrize("name", SEARCHES)
def test_the_discriminator_may_stay_uniform(name: str, recorded: Recorded) -> None:
    env, recorder = recorded(30)
    build_agent(name, discriminator=False).learn(env)
    assert {e.plan["discriminator"] for e in recorder.plans} == {env.uniform_plan()["discriminator"]}
    assert len({e.plan["generator"] for e in recorder.plans}) == 30


@pytest.mark.parametrize("name", ["cma-es", "evolution"])
def test_a_generation_has_one_budget(name: str, recorded: Recorded) -> None:
    env, recorder = recorded(32, budgets={"generator": "0.05:0.5"})
    size = {"population": 8} if name == "cma-es" else {"children": 8}
    build_agent(name, **size).learn(env)
    budgets = [evaluation.budgets["generator"] for evaluation in recorder.plans]
    generations = [set(budgets[first : first + 8]) for first in range(0, 32, 8)]
    assert [len(one) for one in generations] == [1, 1, 1, 1]
    assert len(set.union(*generations)) == 4


@pytest.mark.parametrize("name", SEARCHES)
def test_it_goes_on_from_what_it_has(name: str, recorded: Recorded, tmp_path: Path) -> None:
    env, _ = recorded(60)
    first = build_agent(name)
    first.learn(env)
    assert first.propose(env) == env.best.plan
    first.save(tmp_path)
    draws = {"first": 1000} if name == "tpe" else {}  # the estimator that follows looks anywhere
    again = build_agent(name, seed=1, sigma=1e-3, **draws)
    again.load(tmp_path)
    fresh, recorder = recorded(5)
    again.learn(fresh)
    near = np.array([evaluation.plan["generator"] for evaluation in recorder.plans])
    assert np.abs(near - env.best.plan["generator"]).max() <= 4  # one multiple, by rounding


def test_a_search_that_finds_nothing_proposes_uniform(recorded: Recorded) -> None:
    env, recorder = recorded(4)
    agent = build_agent("evolution", seed=0, sigma=4.0)
    agent.learn(env)
    assert max(evaluation.potential for evaluation in recorder.plans) < 0
    assert agent.propose(env) == env.uniform_plan()


@pytest.mark.parametrize("name", SEARCHES)
def test_a_plan_of_other_networks_is_refused(name: str, recorded: Recorded, tmp_path: Path) -> None:
    env, _ = recorded(40)
    agent = build_agent(name)
    agent.learn(env)
    agent.save(tmp_path)
    path = tmp_path / "agent.json"
    content = json.loads(path.read_text())
    content["proportions"]["generator"].pop()
    path.write_text(json.dumps(content))
    agent.load(tmp_path)
    for call in (agent.propose, agent.learn):
        with pytest.raises(UserError, match="groups"):
            call(env)
    content["proportions"] = {"generator": ["wide"]}
    path.write_text(json.dumps(content))
    with pytest.raises(UserError, match="no plan"):
        agent.load(tmp_path)


@pytest.mark.parametrize(
    ("name", "options", "sentence"),
    [
        ("cma-es", {"sigma": 0.0}, "sigma is 0"),
        ("cma-es", {"sigma": float("nan")}, "sigma is nan"),
        ("cma-es", {"population": 3}, "population is 3"),
        ("cma-es", {"growth": 0.5}, "growth is 0.5"),
        ("evolution", {"sigma": -1.0}, "sigma is -1"),
        ("evolution", {"parents": 0}, "parents is 0"),
        ("evolution", {"children": 0}, "children is 0"),
        ("evolution", {"crossover": 1.5}, "crossover is 1.5"),
        ("tpe", {"sigma": 0.0}, "sigma is 0"),
        ("tpe", {"reach": 0.0}, "reach is 0"),
        ("tpe", {"first": 0}, "first is 0"),
        ("tpe", {"candidates": 0}, "candidates is 0"),
    ],
)
def test_impossible_options_are_refused(name: str, options: dict[str, float], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        build_agent(name, **options)


def test_crossed_children_take_every_coordinate_from_one_of_two_parents() -> None:
    strategy = PlusStrategy(np.zeros(40), 1e-9, 2, 6, np.random.default_rng(0), crossover=1.0)
    strategy.ask()
    parents = np.array([np.full(40, 1.0), np.full(40, 2.0), *np.zeros((4, 40))])
    strategy.tell(parents, np.array([2.0, 1.0, 0.0, 0.0, 0.0, 0.0]))
    children = strategy.ask()
    assert set(np.unique(children.round(6))) == {1.0, 2.0}
    assert any(0 < np.mean(child < 1.5) < 1 for child in children)


def test_without_crossover_children_have_one_parent() -> None:
    strategy = PlusStrategy(np.zeros(40), 1e-9, 2, 6, np.random.default_rng(0), crossover=0.0)
    strategy.ask()
    parents = np.array([np.full(40, 1.0), np.full(40, 2.0), *np.zeros((4, 40))])
    strategy.tell(parents, np.array([2.0, 1.0, 0.0, 0.0, 0.0, 0.0]))
    assert all(len(np.unique(child.round(6))) == 1 for child in strategy.ask())


def test_tpe_says_nothing_and_stays_in_reach(
    capfd: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    options = TpeOptions(reach=0.5, sigma=1.0, first=3)
    estimator = ParzenEstimator(np.full(4, 2.0), 0.0, options, np.random.default_rng(0))
    for _ in range(12):
        points = estimator.ask()
        assert np.abs(points - 2.0).max() <= 0.5 + 1e-9
        estimator.tell(points, -((points - 2.3) ** 2).sum(1))
    assert capfd.readouterr() == ("", "")
    assert not list(tmp_path.iterdir())


def test_coordinates_and_back() -> None:
    networks = toy_env().scorer.networks
    coordinates = Coordinates(networks, discriminator=True)
    assert coordinates.size == 9
    point = np.array([1.0, -1.0, 0.0, 0.5, -0.5, 0.0, 2.0, -1.0, -1.0])
    there = coordinates.proportions(point)
    assert np.allclose(there["generator"], np.exp([0, -2, -1, -0.5, -1.5, -1]))
    assert np.allclose(there["discriminator"], np.exp([0, -3, -3]))
    assert np.allclose(coordinates.point(there), point)


def test_proportions_stay_positive_and_finite() -> None:
    coordinates = Coordinates(toy_env().scorer.networks, discriminator=True)
    for scale in (1e3, 1e6):
        rows = coordinates.proportions(scale * np.array([1, -1, 1, -1, 1, -1, 1, -1, 1.0]))
        assert all(np.isfinite(row).all() and (row > 0).all() for row in rows.values())


def test_a_single_group_becomes_a_plane() -> None:
    """The library has no one-dimensional search."""
    networks = {
        "generator": toy_network("generator", (8,)),
        "discriminator": toy_network("discriminator", (8,)),
    }
    coordinates = Coordinates(networks, discriminator=False)
    assert coordinates.size == 2
    assert coordinates.proportions(np.array([3.0, -3.0])) == {"generator": [1.0], "discriminator": [1.0]}
