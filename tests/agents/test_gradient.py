from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from agents.gradient import (
    Game,
    Gradient,
    GradientOptions,
    build_agents,
    find_pairs,
    find_targets,
    log_ratio,
    matching_gap,
    prefix_gate,
)
from agents.registry import build_agent
from envs.budget import Budget
from envs.pruning_env import PruningEnv
from envs.toy import toy_env, toy_network
from gan.elastic import ElasticNetwork
from gan.errors import UserError
from gan.evaluations import CountedScorer, EvaluationLog
from tests.agents.conftest import Recorder
from tests.gan.conftest import Pair, make_pair, tiny_generator
from tests.gan.test_scoring import scorer_of


@pytest.fixture(scope="module")
def pair() -> Pair:
    return make_pair()


def real_env(
    pair: Pair,
    evaluations: int | None = 12,
    elastic: Mapping[str, ElasticNetwork] | None = None,
    log: Path | None = None,
    budgets: Mapping[str, float | str] | None = None,
    **options: Any,
) -> tuple[PruningEnv, Recorder]:
    recorder = Recorder()
    scorer = scorer_of(pair, elastic=dict(elastic) if elastic else None)
    kept = None if log is None else EvaluationLog(log, scorer.fingerprint)
    shares = {agent: Budget.of(share) for agent, share in (budgets or {}).items()}
    shares = {"generator": Budget.of(0.4), "discriminator": Budget.of(0.5)} | shares
    counted = CountedScorer(scorer, kept, evaluations)
    return PruningEnv(counted, shares, listener=recorder, **options), recorder


def learned(env: PruningEnv, seed: int = 0, **options: Any) -> Gradient:
    agent = build_agent("gradient", seed, **{"steps": 2, "every": 4, **options})
    agent.learn(env)
    assert isinstance(agent, Gradient)
    return agent


def test_steps_are_counted_as_evaluations(pair: Pair) -> None:
    env, recorder = real_env(pair, 10)
    learned(env)
    assert env.scorer.evaluations == 10
    # 3 evaluations' worth of steps, a plan; the same; 1 is left of the last round, and its plan
    assert len(recorder.plans) == env.scorer.requests == 3
    assert env.scorer.exhausted


def test_it_is_deterministic_and_goes_on_from_its_log(pair: Pair, tmp_path: Path) -> None:
    def search(path: Path | None, evaluations: int, seed: int = 0) -> list[str]:
        env, recorder = real_env(pair, evaluations, log=path)
        learned(env, seed, learning_rate=0.1)
        assert env.scorer.replay_left is None
        return recorder.keys

    whole = search(None, 16)
    assert len(set(whole)) > 1
    search(tmp_path / "log.jsonl", 8)
    assert search(tmp_path / "log.jsonl", 16) == whole
    assert search(None, 16, seed=1) != whole


def test_either_agent_learns_what_it_is_to(pair: Pair) -> None:
    """Without costs, beside the same game of agents that stand still: a generator whose outputs are judged
    more like the dense ones, or a critic that tells them apart better.
    """
    numbers = {name: len(groups) for name, groups in pair.groups.items()}
    for player, peer, sign in (("generator", "discriminator", 1), ("discriminator", "generator", -1)):
        gaps = {}
        for rate in (1e-9, 0.03):
            env, _ = real_env(pair, held=(peer,))
            random = torch.Generator().manual_seed(0)
            agents = build_agents(numbers, 16, random)
            options = GradientOptions(cost=0.0, learning_rate=rate)
            pairs = find_pairs(env, "gradient")
            game = Game(pairs["generator"], env.scorer.networks, agents, options, random, env.held)
            targets = find_targets(env, {"generator": 0.4, "discriminator": 0.5})
            gaps[rate] = [game.step(targets)["generator_log_gap"] for _ in range(60)]
            assert agents[player].head.weight.any()
            assert not agents[peer].head.weight.any()
        assert sign * (np.mean(gaps[1e-9][-20:]) - np.mean(gaps[0.03][-20:])) > 0.1


@pytest.mark.parametrize("seed", [0, 1])
def test_with_its_defaults_it_cuts_what_does_nothing(seed: int) -> None:
    """The two innermost levels hardly reach the image: found, and a better plan than uniform comes of it."""
    idle = (2, 3)
    env, _ = real_env(make_pair(generator=idle_inside()), 40)
    agent = build_agent("gradient", seed)
    agent.learn(env)
    plan, uniform = env.evaluate(agent.propose(env)), env.evaluate(env.uniform_plan())
    kept, even = (one.plan["generator"] for one in (plan, uniform))
    assert sum(kept[i] for i in idle) < sum(even[i] for i in idle)
    assert plan.potential > uniform.potential == 0.0


def idle_inside() -> nn.Module:
    """A tiny generator whose last level but one reads a hundredth of what the innermost sends up."""
    generator = tiny_generator(widths=(16, 24, 32, 24, 16))
    sent = make_pair(generator=generator).groups["generator"][3]
    with torch.no_grad():
        for slot in (slot for slot in sent.slots if slot.axis == "in"):
            reader = generator.get_submodule(slot.module)
            assert isinstance(reader, nn.ConvTranspose2d)  # reads along its first axis
            reader.weight[slot.start : slot.start + sent.channels] *= 0.01
    return generator


def test_it_comes_back_and_refuses_what_is_damaged(pair: Pair, tmp_path: Path) -> None:
    env, recorder = real_env(pair)
    assert build_agent("gradient").propose(env) == env.uniform_plan()
    agent = learned(env, learning_rate=0.1)
    spent, told = (env.scorer.evaluations, env.scorer.requests), len(recorder.plans)
    proposed = agent.propose(env)
    assert ((env.scorer.evaluations, env.scorer.requests), len(recorder.plans)) == (spent, told)
    agent.save(tmp_path)
    assert {path.suffix for path in tmp_path.iterdir()} == {".json", ".safetensors"}
    again = build_agent("gradient", 9)
    again.load(tmp_path)
    assert again.propose(env) == proposed

    with pytest.raises(UserError, match="groups"):
        again.propose(toy_env())
    path = tmp_path / "agent.json"
    content = json.loads(path.read_text())
    content["options"]["hidden"] = 9
    path.write_text(json.dumps(content))
    with pytest.raises(UserError, match="do not fit"):
        again.load(tmp_path)
    del content["groups"]
    path.write_text(json.dumps(content))
    with pytest.raises(UserError, match="no readable agents"):
        again.load(tmp_path)


def test_it_runs_on_ranges_and_holds_who_is_held(pair: Pair) -> None:
    env, recorder = real_env(pair, budgets={"generator": "0.3:0.6"})
    agent = learned(env)
    assert len({plan.budgets["generator"] for plan in recorder.plans}) > 1
    for ratio in (0.3, 0.6):
        agent.propose(env, {"generator": ratio})  # refuses a plan above its budget
    env, recorder = real_env(pair, held=("discriminator",))
    agent = learned(env, learning_rate=0.1)
    assert {plan.plan["discriminator"] for plan in recorder.plans} == {env.uniform_plan()["discriminator"]}
    assert agent.agents is not None
    assert not agent.agents["discriminator"].head.weight.any()  # nothing has moved it


def test_without_feedback_nobody_is_told_of_the_peer(pair: Pair) -> None:
    for feedback in (True, False):
        env, _ = real_env(pair, feedback=feedback)
        agents = learned(env, learning_rate=0.1).agents
        assert agents is not None
        assert [bool(agent.told.any()) for agent in agents.values()] == [feedback] * 2


def test_a_scorer_without_networks_is_refused() -> None:
    with pytest.raises(UserError, match=r"sends gradients through the networks, and ToyScorer has none"):
        build_agent("gradient").learn(toy_env(24))


def test_a_search_without_an_end_is_refused(pair: Pair) -> None:
    with pytest.raises(UserError, match="evaluations"):
        build_agent("gradient").learn(real_env(pair, None)[0])


@pytest.mark.parametrize(
    "options",
    [
        {"steps": 0},
        {"every": 0},
        {"learning_rate": 0.0},
        {"temperature": math.inf},
        {"cost": -1.0},
        {"warp": 9},
    ],
)
def test_impossible_options_are_refused(options: dict[str, float]) -> None:
    with pytest.raises(UserError, match=next(iter(options))):
        build_agent("gradient", **options)


def test_the_matching_gap_by_hand() -> None:
    dense = torch.tensor([0.0, 2.0, 4.0, 6.0]).view(4, 1, 1, 1)  # two neighbourhoods of two; variance 5
    made = torch.tensor([2.0, 2.0, 5.0, 5.0]).view(4, 1, 1, 1)  # means 2, 5 instead of 1, 5
    assert float(matching_gap(dense, made, 2)) == pytest.approx(0.5 / 5)
    assert float(matching_gap(3 * dense - 1, 3 * made - 1, 2)) == pytest.approx(0.5 / 5)
    assert float(matching_gap(dense, made, 1)) == pytest.approx(0.5**2 / 5)
    swapped = dense[[1, 0, 3, 2]]
    assert float(matching_gap(dense, swapped, 2)) == 0.0  # within a neighbourhood the order is nothing
    assert float(matching_gap(dense, swapped, 4)) > 0.0
    places = torch.stack([dense, dense.flip(0)], dim=3).flatten(3)  # every patch is matched for itself
    assert float(matching_gap(places, places.flip(3), 2)) > 0.0


def test_gates_are_a_prefix_of_whole_multiples() -> None:
    for ratio, width in ((0.01, 4), (0.3, 4), (0.5, 8), (0.6, 12), (0.99, 18)):
        gate = prefix_gate(torch.logit(torch.tensor(ratio)), 18, 4, 0.4)
        assert gate.tolist() == pytest.approx([1.0] * width + [0.0] * (18 - width))


def test_gates_have_the_gradient_of_their_sigmoid() -> None:
    logit = torch.tensor(0.3, requires_grad=True)
    prefix_gate(logit, 8, 4, 0.5).sum().backward()
    soft = [1 / (1 + math.exp(-(0.3 - math.log(m / (1 - m))) / 0.5)) for m in (0.25, 0.75)]
    assert logit.grad is not None
    assert float(logit.grad) == pytest.approx(sum(4 * s * (1 - s) / 0.5 for s in soft), rel=1e-5)


def test_the_cost_term_is_a_log_ratio() -> None:
    network = toy_network("generator", (16, 16))
    widths = torch.tensor([8.0, 12.0], requires_grad=True)
    cost = float(network.cost_of(np.array([8, 12])))
    term = log_ratio(network, widths, cost / 2)
    assert float(term.detach()) == pytest.approx(math.log(2))
    term.backward()
    # MACs are products of two widths, so a difference of one channel is their slope
    slope = float(network.cost_of(np.array([9, 12])) - network.cost_of(np.array([8, 12]))) / cost
    assert widths.grad is not None
    assert float(widths.grad[0]) == pytest.approx(slope, rel=1e-5)
    below = log_ratio(network, widths, 2 * cost)
    assert float(below.detach()) == pytest.approx(math.log(2))
    widths.grad = None
    below.backward()
    assert float(widths.grad[0]) == pytest.approx(-slope, rel=1e-5)
