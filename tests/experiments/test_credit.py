from __future__ import annotations

import itertools
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from agents.registry import build_agent
from envs.toy import toy_env
from experiments.credit import (
    Searched,
    balance_of_search,
    describe_credit,
    settings_of,
    shapley_values,
    share_credit,
    summary,
    write_credit,
)
from experiments.runs import RunFolder
from experiments.trials import Trial, TrialResult
from gan.distillation import NO_INGREDIENTS, Ingredients
from gan.evaluation import KID
from gan.evaluations import EvaluationLog
from gan.plans import Plan


def test_shapley_of_two_by_hand() -> None:
    # alone 1 and 2, both 5: of the 2 that only both get, each takes half
    gains = {frozenset(): 0.0, frozenset("g"): 1.0, frozenset("d"): 2.0, frozenset("gd"): 5.0}
    assert shapley_values(gains, "gd") == {"g": 2.0, "d": 3.0}


def test_shapley_of_three_is_the_mean_over_orders() -> None:
    rng = np.random.default_rng(0)
    agents = "abc"
    gains = {
        frozenset(subset): float(rng.normal())
        for size in range(4)
        for subset in itertools.combinations(agents, size)
    }
    values = shapley_values(gains, agents)
    for agent in agents:
        marginal = []
        for order in itertools.permutations(agents):
            before = frozenset(order[: order.index(agent)])
            marginal.append(gains[before | {agent}] - gains[before])
        assert values[agent] == pytest.approx(np.mean(marginal))
    assert sum(values.values()) == pytest.approx(gains[frozenset(agents)] - gains[frozenset()])


@pytest.mark.parametrize(
    ("options", "ingredients"),
    [
        ({}, NO_INGREDIENTS),  # of a version without any
        ({"ingredients": {"perceptual": 0.0}}, NO_INGREDIENTS),
        ({"ingredients": {"perceptual": 7.0, "variants": 2}}, Ingredients(perceptual=7.0, variants=2)),
    ],
)
def test_plans_are_finetuned_as_the_run_did(
    options: dict[str, Any], ingredients: Ingredients, tmp_path: Path
) -> None:
    folder = RunFolder(tmp_path)
    folder.elastic_reference.write_text('{"start": "dense"}')
    folder.options.write_text('{"task": "edges2emoji"}')
    settings = settings_of(folder, options, "cpu")
    assert settings.ingredients == ingredients
    assert (settings.weights, settings.split) == ("dense", "test")


def test_shares_sum_to_the_gain_and_cost_no_evaluation(tmp_path: Path) -> None:
    env = toy_env(60)
    build_agent("random", 1).learn(env)
    assert env.best is not None
    plan, spent = env.best.plan, env.scorer.evaluations
    credit = share_credit(env, plan)
    assert env.scorer.evaluations == spent
    assert credit.joint == pytest.approx(env.best.potential)
    assert sum(credit.shapley.values()) == pytest.approx(credit.joint)
    for agent in plan:
        assert credit.shapley[agent] == pytest.approx(sum(row[agent] for row in credit.terms.values()))
    alone = env.evaluate(plan.replace("discriminator", env.uniform_plan()["discriminator"]), counted=False)
    assert credit.alone["generator"] == alone.potential
    # only the balance of the toy depends on the discriminator
    assert credit.terms["mmd_gap"]["discriminator"] == 0.0
    assert credit.terms["balance_gap"]["discriminator"] != 0.0
    write_credit(RunFolder(tmp_path), credit)
    assert json.loads((tmp_path / "credit.json").read_text())["shapley"] == credit.shapley
    assert f"{credit.joint:+.3f}" in describe_credit(credit)


def test_the_uniform_plan_earns_nothing() -> None:
    env = toy_env(1)
    env.prepare()
    credit = share_credit(env, env.uniform_plan())
    assert credit.joint == 0.0
    assert set(credit.shapley.values()) == {0.0}


def test_a_held_network_earns_nothing() -> None:
    env = toy_env(30, held=("discriminator",))
    build_agent("random").learn(env)
    assert env.best is not None
    assert env.best.potential > 0
    credit = share_credit(env, env.best.plan)
    assert credit.shapley == pytest.approx({"generator": credit.joint, "discriminator": 0.0})


def test_balance_over_a_search(tmp_path: Path) -> None:
    scorer = toy_env().scorer.scorer
    log = EvaluationLog(tmp_path / "evaluations.jsonl", scorer.fingerprint)
    env = toy_env(40, log=log)
    build_agent("random", 2).learn(env)
    assert env.best is not None
    # as a program that comes later reads it
    again = toy_env(40, log=EvaluationLog(log.path, scorer.fingerprint))
    history = balance_of_search(Searched(again, env.best.plan, env.best.budgets))
    assert len(history.gaps) == len(history.best) == 40
    assert history.best[-1] == env.best.scores.gaps["balance_gap"]
    assert history.uniform == env.evaluate(env.uniform_plan(), counted=False).scores.gaps["balance_gap"]
    assert set(history.best) <= {*history.gaps, history.uniform}
    assert again.scorer.computed == 0


def test_summaries_are_means_over_finetunings() -> None:
    plan = Plan.of({"generator": [4]})
    results = [
        TrialResult(
            Trial("a", plan, seed), {"balance_gap": 2.0}, {"balance_gap": 1.0, KID: kid}, margin, 0.5, 9.0
        )
        for seed, kid, margin in ((0, 1.0, 2.0), (1, 2.0, 4.0))
    ]
    assert summary({"a": results}) == {
        "a": {
            "margin": 3.0,
            "margin_spread": 0.5,
            "margin_swing": pytest.approx(math.nan, nan_ok=True),
            "balance_gap_before": 2.0,
            "balance_gap_after": 1.0,
            KID: 1.5,
        }
    }
