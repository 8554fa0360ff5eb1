from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import gan.tasks
from envs.budget import Budget
from experiments import survey, trials
from experiments.build import prunable
from experiments.candidates import NamedPlan, draw_over_range
from experiments.figures import Cloud, calibration
from experiments.survey import KID, Finetuned, Options, SurveyFolder, collect
from experiments.trials import Settings, Trial, TrialLog, TrialResult
from gan.errors import UserError
from gan.plans import Plan
from gan.surrogate import Searched, load_surrogate
from gan.tasks import Task
from tests.gan.conftest import Pair, _pair, fake_extractor, pair, task

__all__ = ["Pair", "_pair", "pair", "task"]  # fixtures

OPTIONS = Options(task="tiny", budget="generator=0.4:0.9,discriminator=0.5:0.9", plans=16, elastic="dense")
DENSE = 0.3


def kid_of(plan: Plan) -> float:
    """Falls with the generator's channels alone."""
    return DENSE * (40 / sum(plan["generator"])) ** 0.5


def finetuned(plan: Plan, seed: int, discriminator: str = "pruned", label: str = "p") -> TrialResult:
    row = {KID: kid_of(plan) * (1 + 0.001 * seed)}
    return TrialResult(Trial(label, plan, seed, discriminator), row, row, 0.0, 0.0, 1.0)  # type: ignore[arg-type]


@pytest.fixture
def tiny(task: Task, monkeypatch: pytest.MonkeyPatch) -> Task:
    def fake_trials(settings: Settings, jobs: Sequence[Trial], log: Path, *, on_done: Any, **_: Any) -> None:
        journal = TrialLog(log, settings.fingerprint(task))
        for trial in jobs:
            if trial.key not in journal.results:
                journal.append(finetuned(trial.plan, trial.seed, label=trial.label))
                on_done(journal.results[trial.key])

    monkeypatch.setattr(survey, "load_task", lambda *_: task)
    monkeypatch.setattr(survey, "run_trials", fake_trials)
    monkeypatch.setattr(survey, "dense_row", lambda *_: {KID: DENSE})
    monkeypatch.setattr(trials, "load_extractor", lambda **_: fake_extractor())
    monkeypatch.setattr(gan.tasks, "load_extractor", lambda **_: fake_extractor())
    return task


def write_study(path: Path, task: Task, plans: Sequence[Plan], options: Options = OPTIONS) -> Path:
    """Plans that another program has finetuned with two seeds, one of them beside the dense discriminator."""
    path.mkdir()
    log = TrialLog(path / "finetuned.jsonl", survey.settings_of(options).fingerprint(task))
    for plan in plans:
        for seed in (0, 1):
            log.append(finetuned(plan, seed))
    log.append(finetuned(plans[0].replace("generator", [4] * len(plans[0]["generator"])), 0, "dense"))
    return path


def test_budgets_are_spread_over_the_range(task: Task) -> None:
    networks = prunable(task, "macs")
    budgets = {"generator": Budget(0.35, 0.9), "discriminator": Budget(0.5, 0.9)}
    plans = draw_over_range(networks, budgets, 20, np.random.default_rng(0), "l1")
    shares = sorted(
        float(networks["generator"].cost.macs(np.array(one.plan["generator"])))
        / float(networks["generator"].cost.macs(networks["generator"].channels))
        for one in plans
    )
    assert shares[0] < 0.45
    assert 0.7 < shares[-1] <= 0.9
    assert max(np.diff(shares)) < 0.25
    assert draw_over_range(networks, budgets, 20, np.random.default_rng(0), "l1") == plans


def test_the_road_and_its_resume(tiny: Task, tmp_path: Path) -> None:
    random = np.random.default_rng(5)
    others = [one.plan for one in survey.draw_over_range(
        prunable(tiny, "macs"), survey.build_budgets(OPTIONS.budget), 6, random, "l1"
    )]  # fmt: skip
    study = write_study(tmp_path / "other", tiny, others)
    output = tmp_path / "survey"
    survey.main(replace(OPTIONS, join=(study,), output=output))
    folder = SurveyFolder(output)
    found = json.loads(folder.report.read_text())
    assert list(found["sources"]) == ["survey", "other", "all"]
    assert found["sources"]["all"]["plans"] == len({p.key for p in others} | own_keys(folder))
    assert found["sources"]["all"]["tau"][0] > 0.8  # what is learnt is simple
    assert found["sources"]["other"]["apart"][0] > 0.6
    surrogate = load_surrogate(folder.surrogate)
    assert surrogate.dense == DENSE
    low, high = found["reach"]["macs"]["generator"]
    assert surrogate.reach({"generator": tiny.cost_model("generator")}, "macs")["generator"] == (low, high)
    assert 0.3 < low < 0.5 < 0.7 < high <= 0.9
    assert folder.figure.read_bytes().startswith(b"\x89PNG")
    before = folder.table.read_text(), folder.finetuned.read_bytes()
    survey.main(Options(resume=output))
    assert (folder.table.read_text(), folder.finetuned.read_bytes()) == before


def test_predictions_join_with_their_examples(tiny: Task, tmp_path: Path) -> None:
    survey.main(replace(OPTIONS, output=tmp_path / "first"))
    first = SurveyFolder(tmp_path / "first")
    random = np.random.default_rng(5)
    budgets = survey.build_budgets(OPTIONS.budget)
    others = [one.plan for one in draw_over_range(prunable(tiny, "macs"), budgets, 6, random, "l1")]
    study = write_study(tmp_path / "other", tiny, [*others, load_surrogate(first.surrogate).examples[0].plan])
    led = json.loads(first.surrogate.read_text())
    led["searched"] = [{"cost": "macs", "budgets": {"generator": 0.5, "discriminator": 0.5}}]
    first.surrogate.write_text(json.dumps(led))
    join = (first.surrogate, study)
    survey.main(replace(OPTIONS, plans=0, join=join, output=tmp_path / "second"))
    second = load_surrogate(SurveyFolder(tmp_path / "second").surrogate)
    old = {example.plan.key: example for example in load_surrogate(first.surrogate).examples}
    new = {example.plan.key: example for example in second.examples}
    assert set(new) == set(old) | {plan.key for plan in others}
    for key in set(old) - {plan.key for plan in others}:
        assert new[key].gaps == pytest.approx(old[key].gaps)
    # the study holds this plan's finetunings singly, so that the file's mean of them does not count again
    twice = load_surrogate(first.surrogate).examples[0].plan
    assert new[twice.key].metric == pytest.approx(kid_of(twice) * 1.0005)
    assert second.searched == (Searched("macs", {"generator": 0.5, "discriminator": 0.5}),)


def test_a_file_of_other_predictions_is_refused(tiny: Task, tmp_path: Path) -> None:
    survey.main(replace(OPTIONS, output=tmp_path / "first"))
    file = SurveyFolder(tmp_path / "first").surrogate
    other = json.loads(file.read_text())
    other["scope"]["weights"] = "0123"
    (tmp_path / "other.json").write_text(json.dumps(other))
    with pytest.raises(UserError, match=r"predictions of .*other\.json are for other networks"):
        survey.main(replace(OPTIONS, plans=0, join=(tmp_path / "other.json",), output=tmp_path / "second"))
    assert not (tmp_path / "second").exists()


def own_keys(folder: SurveyFolder) -> set[str]:
    return {Plan.from_dict(item).key for item in json.loads(folder.plans.read_text())}


def test_equal_plans_are_taken_together_and_dense_discriminators_left_out(tiny: Task, tmp_path: Path) -> None:
    output = tmp_path / "survey"
    survey.main(replace(OPTIONS, output=output))
    folder = SurveyFolder(output)
    twin = Plan.from_dict(json.loads(folder.plans.read_text())[3])
    study = write_study(tmp_path / "other", tiny, [twin])
    rows = collect(replace(OPTIONS, join=(study,)), folder)
    assert len(rows) == len(own_keys(folder))  # the plan beside the dense discriminator is not among them
    (found,) = [row for row in rows if row.plan == twin]
    assert found.source == "survey"
    assert found.kid == pytest.approx((kid_of(twin), kid_of(twin) * 1.001))  # seed 0 is in both, and once


def test_a_survey_is_resumed_from_anywhere(
    tiny: Task, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = survey.draw_over_range(
        prunable(tiny, "macs"), survey.build_budgets(OPTIONS.budget), 1, np.random.default_rng(0), "l1"
    )[0].plan
    write_study(tmp_path / "other", tiny, [plan])
    monkeypatch.chdir(tmp_path)
    survey.main(replace(OPTIONS, join=(Path("other"),), output=Path("survey")))
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    survey.main(Options(resume=tmp_path / "survey"))


def test_many_joined_studies_are_drawn_alike() -> None:
    plan = Plan.of({"generator": (4,)}, "l1")
    few = [Finetuned(name, plan, (1.0,)) for name in ("survey", "found", "a", "b")]
    assert survey.kinds_of(few) == ["survey", "found", "a", "b"]
    many = [*few, *(Finetuned(f"study {n}", plan, (1.0,)) for n in range(6))]
    kinds = survey.kinds_of(many)
    assert kinds == ["survey", "found", *["joined"] * 8]
    cloud = Cloud("KID", "prediction", np.arange(10.0), 0.5)
    assert calibration([cloud], np.ones((10, 1)), kinds).axes


def test_predictions_may_lead_searches_where_runs_have_searched(
    tiny: Task, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two runs at one budget found one plan: it is finetuned once, and the budget is named once."""
    budget = Searched("params", {"generator": 0.5, "discriminator": 0.6})
    plan = survey.draw_over_range(
        prunable(tiny, "macs"), survey.build_budgets(OPTIONS.budget), 1, np.random.default_rng(9), "l1"
    )[0].plan
    monkeypatch.setattr(survey, "plan_of_run", lambda path, _: (NamedPlan(path.name, "found", plan), budget))
    survey.main(replace(OPTIONS, found=(Path("a"), Path("b")), output=tmp_path / "survey"))
    folder = SurveyFolder(tmp_path / "survey")
    assert load_surrogate(folder.surrogate).searched == (budget,)
    assert json.loads(folder.report.read_text())["sources"]["found"]["plans"] == 1


def test_studies_under_other_settings_are_refused(tiny: Task, tmp_path: Path) -> None:
    plan = survey.draw_over_range(
        prunable(tiny, "macs"), survey.build_budgets(OPTIONS.budget), 1, np.random.default_rng(0), "l1"
    )[0].plan
    study = write_study(tmp_path / "other", tiny, [plan], replace(OPTIONS, epochs=3))
    with pytest.raises(survey.UserError, match="written with another finetuning"):
        survey.open_survey(replace(OPTIONS, join=(study,), output=tmp_path / "survey"))
    assert not (tmp_path / "survey").exists()


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ("--plans 4", "--plans is 4; it must be 8 or more"),
        ("--seeds 0", "--seeds is 0"),
        (
            "--budget 1 --plans 16",
            "different plans; with the 0 that join it takes 8: draw more, give wider ranges",
        ),
        ("--seed -1", "--seed is -1"),
        ("--budget 0.000001", "cannot be reached"),
        ("--join nowhere", "nowhere holds no finetuned plans"),
        ("--found nowhere", "nowhere does not exist"),
        ("--resume nowhere", "nowhere does not exist"),
    ],
)
@pytest.mark.usefixtures("tiny")
def test_bad_input_is_a_sentence(arguments: str, sentence: str, refused: Callable[..., None]) -> None:
    given = ["--elastic", "dense", "--budget", "generator=0.4:0.9,discriminator=0.5:0.9", *arguments.split()]
    refused(survey.main, Options, given, sentence)
