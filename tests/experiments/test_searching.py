from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from agents.base import rehearse
from agents.registry import build_agent
from envs.rewards import Weights
from envs.toy import toy_env, toy_scorer
from experiments.comparison import RunOptions
from experiments.runs import RunFolder, plain, read_json, read_metrics
from experiments.searching import Problem, find, judging, learn, write_plans
from gan.evaluations import CountedScorer

PROBLEM = Problem("generator=0.1,discriminator=0.5", 30, weights=Weights(recovery=0.0))


def test_problems_of_runs() -> None:
    weights = Weights(density=0.0)
    run = RunOptions(weights=weights, feedback=False, held=("discriminator",), start="dense", reward="step")
    problem = Problem.of_run(plain(run))
    assert problem == Problem(
        run.budget, 300, "params", "dense", "step", weights, feedback=False, held=("discriminator",)
    )
    # a run of the main job says less
    assert Problem.of_run({"budget": "0.1", "evaluations": 9}) == Problem("0.1", 9)


def test_a_search_keeps_every_best_plan(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    env = PROBLEM.env(toy_scorer(), folder)
    env.prepare()
    agent = build_agent("random", 3)
    found = learn(env, agent, folder)
    assert env.listener is None
    assert found[0].evaluations == 0
    assert found[0].evaluation.plan == env.uniform_plan()
    assert found[-1].evaluation is env.best
    potentials = [one.evaluation.potential for one in found]
    assert potentials == sorted(set(potentials))
    frame = read_metrics(folder)
    for spent, evaluation in found[1:]:
        row = frame[frame["evaluations"] == spent].iloc[0]
        assert row["return"] == pytest.approx(evaluation.potential, rel=1e-6)
    assert (folder.policy / "agent.json").is_file()

    write_plans(folder, find(env, agent))
    plans = read_json(folder.plan)
    assert list(plans) == ["best", "proposed", "uniform"]
    assert plans["best"]["potential"] == potentials[-1]
    assert plans["uniform"]["potential"] == 0.0


@pytest.mark.parametrize(("name", "own"), [("magnitude", True), ("random", False)])
def test_a_rule_stands_for_its_own_plan_however_it_scores(name: str, own: bool, tmp_path: Path) -> None:
    env = PROBLEM.env(toy_scorer(), RunFolder(tmp_path))
    env.prepare()
    learn(env, build_agent("random", 3), RunFolder(tmp_path))
    poor = env.evaluate(env.uniform_plan(), counted=False)
    assert env.best is not None
    assert poor.potential < env.best.potential
    stand_in = SimpleNamespace(name=name, propose=lambda *_: poor.plan)
    found = find(env, stand_in)  # type: ignore[arg-type]
    assert found["proposed"].plan == poor.plan
    assert found["best"].plan == (poor.plan if own else env.best.plan)


def test_judging_is_free_and_by_the_weights_given(tmp_path: Path) -> None:
    env = PROBLEM.env(toy_scorer(), RunFolder(tmp_path))
    env.prepare()
    learn(env, build_agent("random"), RunFolder(tmp_path))
    assert env.best is not None
    spent = env.scorer.evaluations
    judge = judging(env, Weights(density=0.0, recovery=0.0, fidelity=0.0, balance=2.0))
    verdict = judge.evaluate(env.best.plan, counted=False)
    assert verdict.term_scores == env.best.term_scores
    assert verdict.potential == pytest.approx(2.0 * env.best.term_scores["balance_gap"])
    assert env.scorer.evaluations == spent
    other = judging(env, env.weights, CountedScorer(toy_scorer(coupling=0.0)))
    assert other.evaluate(env.best.plan, counted=False).scores != env.best.scores


def test_rehearsals_keep_what_was_taken_away() -> None:
    env = rehearse(toy_env(5, feedback=False, held=("generator",)))
    assert (env.feedback, env.held) == (False, frozenset({"generator"}))
