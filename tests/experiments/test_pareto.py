from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from agents.registry import build_agent
from envs.budget import Budget
from envs.pruning_env import PruningEnv
from envs.toy import TOY_WEIGHTS, toy_env
from experiments import pareto, train_agents
from experiments.credit import Searched
from experiments.front import Place
from experiments.pareto import Judged, Known, Options, main, open_runs, volumes
from experiments.runs import RunFolder, create_run, describe_run, read_json, scored_plans
from experiments.searching import find, learn, write_plans
from experiments.trials import Settings, Trial, TrialResult
from gan.errors import UserError
from gan.evaluation import KID
from gan.evaluations import EvaluationLog
from gan.files import write_json

RANGE = {"generator": Budget(0.1, 0.4)}


def ranged_env() -> PruningEnv:
    return toy_env(24, budgets=RANGE)


def make_run(root: Path, algo: str, budget: str, seed: int = 0) -> RunFolder:
    """A search on the toy problem, as a run folder."""
    folder = create_run("toy", algo, seed, root=root)
    options = train_agents.Options(task="toy", algo=algo, seed=seed, budget=budget, evaluations=24)
    describe_run(folder, options)
    write_json(folder.elastic_reference, {"start": "elastic", "hash": "toy"})
    env, agent = toy_env(24, budgets={"generator": budget}), build_agent(algo, seed)
    env.prepare()
    env.scorer.log = EvaluationLog(folder.evaluations, env.scorer.scorer.fingerprint)
    learn(env, agent, folder)
    write_plans(folder, find(env, agent))
    met = scored_plans(folder)
    folder.evaluations.unlink()  # the toy's gaps depend on the budget, those of networks do not
    scorer = ranged_env().scorer
    scorer.log = EvaluationLog(folder.evaluations, scorer.scorer.fingerprint)
    for plan, _ in met:
        scorer.score(plan)
    return folder


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, RunFolder]:
    """A policy of a range, and random searches at two fixed budgets."""
    root = tmp_path_factory.mktemp("runs")
    named = {"policy": ("mappo", "0.1:0.4"), "low": ("random", "0.1"), "high": ("random", "0.4")}
    return {name: make_run(root, *kind) for name, kind in named.items()}


@pytest.fixture
def toy_scores(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs are opened with the toy environment, and finetuning gives a number for each plan."""

    def reopen(folder: RunFolder, options: dict[str, Any], device: str) -> Searched:
        env = ranged_env()
        env.prepare()
        budgets = {agent: budget.low for agent, budget in env.budgets.items()}
        return Searched(env, env.uniform_plan(budgets), budgets)

    def run_trials(
        settings: Settings, trials: Sequence[Trial], log: Path, **more: object
    ) -> list[TrialResult]:
        rows = ({KID: 1 / sum(trial.plan["generator"]) + trial.seed, "l1": 0.5} for trial in trials)
        return [TrialResult(trial, {}, row, 0, 0, 0) for trial, row in zip(trials, rows, strict=True)]

    monkeypatch.setattr(pareto, "reopen", reopen)
    monkeypatch.setattr(pareto, "settings_of", lambda *_: Settings("toy", "elastic", 1))
    monkeypatch.setattr(pareto, "run_trials", run_trials)
    monkeypatch.setattr(pareto, "load_task", lambda *_: None)
    monkeypatch.setattr(pareto, "check_counterparts", lambda *_: None)
    monkeypatch.setattr(pareto, "dense_row", lambda *_: {KID: 0.001, "l1": 0.4})


def test_budgets_are_spread_over_the_range() -> None:
    env = ranged_env()
    budgets = Judged(env).budgets(3)
    assert [round(one["generator"], 6) for one in budgets] == [0.1, 0.2, 0.4]
    assert len({one["discriminator"] for one in budgets}) == 1


def test_gaps_of_all_budgets_have_one_unit() -> None:
    env = ranged_env()
    judged = Judged(env)
    middle, high = (judged.budgets(3)[place] for place in (1, 2))
    plan = env.uniform_plan(high)
    point = judged.point(plan, high)
    gaps = env.scorer.score(plan, counted=False).gaps
    spreads = env.references.at(middle).spreads
    by_hand = sum(TOY_WEIGHTS.of(term) * gap / spreads[term] for term, gap in gaps.items())
    assert point.values["gap"] == pytest.approx(by_hand)
    assert point.score == 0  # uniform, at its own budget
    assert point.cost == pytest.approx(0.4, abs=0.02)
    assert env.scorer.evaluations == 0
    assert judged.point(plan, {**high, "generator": 0.9}).score is None  # nothing gives it a unit there


@pytest.mark.usefixtures("toy_scores")
def test_a_front_is_asked_scored_and_drawn(runs: dict[str, RunFolder], tmp_path: Path) -> None:
    paths = tuple(folder.path for folder in runs.values())
    main(Options(paths, points=3, finetune=True, seeds=2, output=tmp_path / "new" / "front", workers=1))
    output = tmp_path / "new" / "front"
    content = read_json(output / "front.json")
    labels = [front["label"] for front in content["fronts"]]
    assert labels == ["uniform", "mappo, one policy", "random, a run a budget"]
    uniform, policy, random = content["fronts"]
    assert [len(front["points"]) for front in content["fronts"]] == [3, 3, 2]
    spent = [Known(folder, read_json(folder.options)).evaluations for folder in runs.values()]
    assert uniform["evaluations"] == 0
    assert policy["evaluations"] == spent[0] + 3
    assert random["evaluations"] == spent[1] + spent[2]
    best = read_json(runs["low"].plan)["best"]
    assert random["points"][0]["plan"]["widths"] == best["widths"]
    assert set(policy["hypervolume"]) == {"gap", KID, "l1"}
    assert policy["hypervolume"]["l1"] == 0  # no better than the worst uniform plan
    point = policy["points"][0]
    # the mean over both seeds
    assert point["values"][KID] == pytest.approx(0.5 + 1 / sum(point["plan"]["widths"]["generator"]))
    text = (output / "table.md").read_text()
    assert f"| mappo, one policy | {spent[0] + 3} | 3 |" in text
    assert "were asked for 0.1, 0.2, 0.4." in text
    assert "another reward" not in text
    assert "reference point" in text
    with Image.open(output / "front.png") as image:
        assert image.width > 1000
    assert (output / "front.pdf").stat().st_size > 1000


@pytest.mark.usefixtures("toy_scores")
def test_what_was_scored_on_the_way_is_a_front_too(runs: dict[str, RunFolder], tmp_path: Path) -> None:
    paths = tuple(folder.path for folder in runs.values())
    main(Options(paths, points=3, scored=True, output=tmp_path))
    fronts = {front["label"]: front for front in read_json(tmp_path / "front.json")["fronts"]}
    judged = Judged(ranged_env())
    for label, names in (("mappo, one policy", ["policy"]), ("random, a run a budget", ["low", "high"])):
        asked, scored = fronts[label], fronts[f"{label}: all that was scored"]
        assert scored["evaluations"] == asked["evaluations"]
        assert scored["hypervolume"]["gap"] >= asked["hypervolume"]["gap"]
        places = [(point["cost"], point["values"]["gap"]) for point in scored["points"]]
        assert places == sorted(places)
        assert [gap for _, gap in places] == sorted((gap for _, gap in places), reverse=True)
        met = [plan for name in names for plan, _ in scored_plans(runs[name])]
        assert len(met) == sum(Known(runs[name], {}).evaluations for name in names)
        for plan in met:  # scored anew, and nothing is ahead of the front
            cost, gap = judged.cost(plan), judged.gap(judged.env.scorer.score(plan, counted=False).gaps)
            assert any(place[0] <= cost and place[1] <= gap + 1e-9 for place in places)
    text = (tmp_path / "table.md").read_text()
    assert "listed in front.json" in text
    assert (
        sum(line.startswith("| mappo, one policy: all that was scored |") for line in text.splitlines()) == 1
    )


def test_logs_that_do_not_compare_are_refused(runs: dict[str, RunFolder], tmp_path: Path) -> None:
    home = Known(runs["policy"], read_json(runs["policy"].options))
    pareto.check_one_yardstick([home, Known(runs["low"], {})])
    other = make_run(tmp_path, "random", "0.1")
    header, *entries = other.evaluations.read_text().splitlines(keepends=True)
    other.evaluations.write_text(
        json.dumps({**json.loads(header), "optimum": "another"}) + "\n" + "".join(entries)
    )
    with pytest.raises(UserError, match=r"scored with another optimum"):
        pareto.check_one_yardstick([home, Known(other, {})])
    other.evaluations.unlink()
    with pytest.raises(UserError, match=r"needs the evaluation log"):
        pareto.check_one_yardstick([home, Known(other, {})])
    with pytest.raises(UserError, match=r"leave out --finetune, or --scored"):
        main(Options((runs["policy"].path,), scored=True, finetune=True))


def test_searches_by_another_reward_are_named(runs: dict[str, RunFolder], tmp_path: Path) -> None:
    home, low = (Known(runs[name], read_json(runs[name].options)) for name in ("policy", "low"))
    assert pareto.other_rewards(home, [low]) == ""
    weighted = Known(low.folder, {**low.options, "weights": {"density": 0.5}})
    assert f"{low.folder.path.name} searched by another reward" in pareto.other_rewards(home, [weighted])
    led = make_run(tmp_path, "random", "0.1")
    led.evaluations.write_text(json.dumps({"format": 1, "surrogate": "5c79"}) + "\n")
    assert "a predicted recovery" in pareto.other_rewards(home, [Known(led, read_json(led.options))])


def test_hypervolumes_are_measured_from_the_worst_uniform_plan() -> None:
    env = ranged_env()
    judged = Judged(env)
    budgets = judged.budgets(2)
    uniform = pareto.uniform_front(judged, budgets)
    better, worst = sorted(uniform.places("gap"), key=lambda place: place.value)
    assert pareto.reference_place([uniform], "gap") == Place(0, worst.value)
    # one rectangle: from the better plan to the dense cost and to the worse one's gap
    area = (0 - better.cost) * (worst.value - better.value)
    assert area > 0
    assert volumes([uniform])["uniform"]["gap"] == pytest.approx(area)


def test_runs_that_do_not_compare_are_refused(runs: dict[str, RunFolder], tmp_path: Path) -> None:
    ranged, fixed = open_runs([runs["low"].path, runs["policy"].path])
    assert ([run.folder for run in ranged], [run.folder for run in fixed]) == (
        [runs["policy"]],
        [runs["low"]],
    )
    again, _ = open_runs([runs["policy"].path, runs["policy"].path / ".." / runs["policy"].path.name])
    assert len(again) == 1  # a run that is named twice has not searched twice
    with pytest.raises(UserError, match=r"needs a run whose generator had a range"):
        open_runs([runs["low"].path])
    other = make_run(tmp_path, "random", "0.1")
    write_json(other.elastic_reference, {"start": "elastic", "hash": "another"})
    with pytest.raises(UserError, match=r"other elastic weights"):
        open_runs([runs["policy"].path, other.path])
    other = make_run(tmp_path, "random", "0.1:0.3")
    with pytest.raises(UserError, match=r"know other ranges"):
        open_runs([runs["policy"].path, other.path])
    with pytest.raises(UserError, match=r"--points is 1"):
        main(Options((runs["policy"].path,), points=1))
