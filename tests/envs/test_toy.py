from __future__ import annotations

import numpy as np
import pytest

from envs.budget import keep_ratio, random_proportions
from envs.toy import toy_env, toy_network, toy_optimum
from gan.evaluations import CountedScorer
from gan.plans import Plan
from tests.envs.conftest import MakeEnv


def test_network_costs_what_its_convolutions_cost() -> None:
    # kernels 4x4: 3 -> 4 channels at 4x4, then transposed -> 6 channels at 8x8 -> 3 channels at 16x16
    network = toy_network("generator", (4, 6), image=8)
    assert network.cost_of(np.array([4, 6])) == 16 * (16 * 3 * 4 + 16 * 4 * 6 + 64 * 6 * 3)
    assert network.groups[1].kind == "transposed"
    # a skip brings the first group's channels to the last convolution too
    skips = toy_network("generator", (4, 6), image=8, skips=True)
    assert skips.cost_of(np.array([4, 6])) == 16 * (16 * 3 * 4 + 16 * 4 * 6 + 64 * (6 + 4) * 3)


def test_optimum_is_feasible_best_and_away_from_uniform() -> None:
    env = toy_env()
    best = toy_optimum(env)
    assert set(best.scores.gaps.values()) == {0.0}
    for agent, network in env.scorer.networks.items():
        assert keep_ratio(network, np.array(best.plan[agent])) <= best.budgets[agent]
        ratio = np.array(best.plan[agent]) / np.array(env.uniform_plan()[agent])
        assert ratio.max() > 1.2
        assert ratio.min() < 0.8
    assert best.potential > 1.4
    assert max(best.term_scores.values()) < 5  # not clipped: a better plan always scores more
    rng = np.random.default_rng(0)
    for _ in range(300):
        proportions = {a: random_proportions(n, rng) for a, n in env.scorer.networks.items()}
        assert env.evaluate(env.plan_from_proportions(proportions)).potential < best.potential


def test_the_best_discriminator_depends_on_the_generator() -> None:
    env = toy_env()
    optimum = toy_optimum(env).plan
    networks = env.scorer.networks
    tilted = env.plan_from_proportions({"generator": [0.3, 0.4, 0.5, 1, 2, 2], "discriminator": [1, 1, 1]})

    def gap(generator: Plan, discriminator: Plan) -> float:
        plan = Plan.of(
            {"generator": generator["generator"], "discriminator": discriminator["discriminator"]}, "toy"
        )
        return env.scorer.scorer.score(plan).gaps["balance_gap"]

    rng = np.random.default_rng(0)
    candidates = [
        env.plan_from_proportions(
            {
                "generator": np.ones(6),
                "discriminator": np.array(optimum["discriminator"])
                / networks["discriminator"].channels
                * np.exp(rng.normal(0, 0.3, 3)),
            }
        )
        for _ in range(200)
    ]
    assert min(gap(tilted, c) for c in candidates) < gap(tilted, optimum)
    assert min(gap(optimum, c) for c in candidates) >= gap(optimum, optimum) == 0.0
    alone = toy_env(coupling=0.0).scorer.scorer
    plans = [
        Plan.of({"generator": p["generator"], "discriminator": optimum["discriminator"]}, "toy")
        for p in (optimum, tilted)
    ]
    assert alone.score(plans[0]).gaps["balance_gap"] == alone.score(plans[1]).gaps["balance_gap"]


def test_optimum_follows_the_budget_range() -> None:
    env = toy_env(budgets={"generator": "0.05:0.2"})
    best = toy_optimum(env)
    assert best.budgets["generator"] == pytest.approx(0.1)
    assert set(best.scores.gaps.values()) == {0.0}


def test_only_a_toy_knows_its_best_plan(make: MakeEnv) -> None:
    with pytest.raises(TypeError, match="FakeScorer"):
        toy_optimum(make())


def test_evaluations_run_out() -> None:
    env = toy_env(evaluations=3, reward="final")
    rng = np.random.default_rng(0)
    episodes = 0
    while not env.scorer.exhausted:
        env.reset()
        while env.agents:
            env.step({agent: rng.uniform(-1, 1, 1) for agent in env.agents})
        episodes += 1
    assert episodes == 3
    assert isinstance(env.scorer, CountedScorer)
