from __future__ import annotations

import io
import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from experiments import trials
from experiments.trials import Factory, Failure, Settings, Trial, TrialLog, TrialResult, Workbench, run_trials
from gan.distillation import NO_INGREDIENTS, PERCEPTUAL, Ingredients
from gan.elastic import ElasticNetwork
from gan.errors import Diverged, UserError
from gan.evaluation import COLUMNS
from gan.plans import Plan
from gan.tasks import Task, load_task
from tests.gan.conftest import Pair, _pair, fake_extractor, pair, task

__all__ = ["Pair", "_pair", "pair", "task"]  # fixtures

PLAN = Plan.of({"generator": (4, 8, 8, 8, 4), "discriminator": (4, 6)}, "l1")
OTHER = Plan.of({"generator": (8, 4, 4, 4, 8), "discriminator": (4, 6)}, "l1")
SETTINGS = Settings("tiny", "dense", epochs=2)
FINGERPRINT = {"task": "tiny", "finetuning": {"epochs": 2}}


@pytest.fixture
def bench(task: Task, monkeypatch: pytest.MonkeyPatch) -> Workbench:
    monkeypatch.setattr(trials, "load_extractor", lambda **_: fake_extractor())
    return Workbench(task, task.ordered(), SETTINGS)


def steady(row: Mapping[str, float]) -> dict[str, float]:
    """A row without what a clock measured."""
    return {name: value for name, value in row.items() if name != "latency_ms"}


def test_a_trial_depends_on_plan_and_seed_alone(bench: Workbench) -> None:
    first = bench(Trial("a", PLAN, 0))
    other = bench(Trial("b", OTHER, 1))
    again = bench(Trial("c", PLAN, 0))  # after another plan and seed
    assert set(first.row) == set(first.raw) == set(COLUMNS)
    assert steady(first.row) == steady(again.row)
    assert (first.margin_mean, first.margin_spread) == (again.margin_mean, again.margin_spread)
    assert steady(first.row) != steady(first.raw)
    assert steady(bench(Trial("a", PLAN, 1)).row) != steady(first.row)
    assert first.raw["macs"] == first.row["macs"] != other.row["macs"]
    assert first.margin_spread > 0


def test_the_dense_discriminator_stays_whole(bench: Workbench, task: Task) -> None:
    pruned, dense = bench(Trial("a", PLAN, 0)), bench(Trial("a", PLAN, 0, "dense"))
    whole = bench.judge.row(task.networks["generator"], task.networks["discriminator"])
    assert dense.row["discriminator_macs"] == whole["discriminator_macs"]
    assert pruned.row["discriminator_macs"] < whole["discriminator_macs"]
    assert dense.raw["l1"] == pruned.raw["l1"]  # the generator's slice is the same
    assert dense.raw["balance_gap"] != pruned.raw["balance_gap"]
    assert dense.row["l1"] != pruned.row["l1"]


def test_ingredients_change_results_and_not_the_teacher(bench: Workbench) -> None:
    plain = bench(Trial("a", PLAN, 0))
    bench.settings = replace(SETTINGS, ingredients=Ingredients(features="alignment", adversary="both"))
    added = bench(Trial("a", PLAN, 0))
    assert steady(added.raw) == steady(plain.raw)
    assert steady(added.row) != steady(plain.row)
    plainest = replace(SETTINGS, ingredients=NO_INGREDIENTS)
    assert "ingredients" not in plainest.fingerprint(bench.task)
    assert SETTINGS.fingerprint(bench.task)["ingredients"]["perceptual"] == PERCEPTUAL


def test_the_teacher_answers_once_a_seed(bench: Workbench) -> None:
    first, second = (SETTINGS.options(seed, bench.task) for seed in (0, 1))
    held = bench.lessons(first)
    assert bench.lessons(first) is held
    assert bench.lessons(second) is not held


def test_in_equal_time_every_trial_asks_its_own_teacher(bench: Workbench) -> None:
    bench.settings = replace(SETTINGS, seconds=1.0)
    options = bench.settings.options(0, bench.task)
    assert bench.lessons(options) is not bench.lessons(options)


def test_results_are_measured_on_test_beside_val(bench: Workbench, task: Task) -> None:
    both = Workbench(task, bench.weights, replace(SETTINGS, with_test=True))(Trial("a", PLAN, 0))
    val, test = (
        Workbench(task, bench.weights, replace(SETTINGS, split=split))(Trial("a", PLAN, 0))
        for split in ("val", "test")
    )
    assert steady(both.row) == steady(val.row)
    assert steady(both.test) == steady(test.row) != steady(val.row)
    assert not val.test
    assert TrialResult.from_dict(json.loads(json.dumps(both.to_dict()))).test == both.test


def test_a_training_that_diverges_is_named(bench: Workbench, monkeypatch: pytest.MonkeyPatch) -> None:
    usual = trials.finetuning_of
    monkeypatch.setattr(trials, "finetuning_of", lambda *x: replace(usual(*x), learning_rate=1e30))
    with pytest.raises(Diverged, match=r"plan x, seed 3: the .* loss is no longer finite"):
        bench(Trial("plan x", PLAN, 3))
    monkeypatch.setattr(Workbench, "build", lambda _: bench)
    failure = Factory(SETTINGS)()(Trial("plan x", PLAN, 3))
    assert isinstance(failure, Failure)
    assert failure.trial.seed == 3
    assert "no longer finite" in failure.reason


def result(label: str = "a", plan: Plan = PLAN, seed: int = 0, kid: float = 1.0) -> TrialResult:
    return TrialResult(Trial(label, plan, seed), {"kid": 2.0}, {"kid": kid}, 0.5, 0.25, 12.0)


def test_the_log_gives_back_what_was_written(tmp_path: Path) -> None:
    log = TrialLog(tmp_path / "x.jsonl", FINGERPRINT)
    written = [result(), result(seed=1, kid=1.5), result("b", OTHER)]
    for one in written:
        log.append(one)
    again = TrialLog(tmp_path / "x.jsonl", FINGERPRINT)
    asked = [Trial("b", OTHER, 0), Trial("b", OTHER, 1), Trial("new name", PLAN, 1)]
    assert again.known(asked) == [written[2], replace(written[1], trial=asked[2])]
    assert again.known([Trial("a", PLAN, 0, "dense")]) == []
    header = json.loads((tmp_path / "x.jsonl").read_text().splitlines()[0])
    assert header == {"format": 1, **FINGERPRINT}


def test_a_torn_line_is_dropped_and_other_settings_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    log = TrialLog(path, FINGERPRINT)
    log.append(result())
    whole = path.read_text()
    path.write_text(whole + '{"label": "b", "pl')
    log = TrialLog(path, FINGERPRINT)
    assert len(log.results) == 1
    log.append(result())
    assert path.read_text() == whole + whole.splitlines(keepends=True)[-1]  # cut off before it was added
    with pytest.raises(UserError, match="written with another finetuning; its results cannot be mixed"):
        TrialLog(path, {**FINGERPRINT, "finetuning": {"epochs": 3}})


def test_the_fingerprint_names_what_results_depend_on(
    task: Task, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(trials, "load_extractor", lambda **_: fake_extractor())
    (tmp_path / "a").write_bytes(b"a")
    (tmp_path / "b").write_bytes(b"b")
    settings = [
        SETTINGS,
        replace(SETTINGS, epochs=3),
        replace(SETTINGS, split="test"),
        replace(SETTINGS, judge_images=4),
        replace(SETTINGS, weights=str(tmp_path / "a")),
        replace(SETTINGS, weights=str(tmp_path / "b")),
    ]
    settings += [replace(SETTINGS, seconds=9.0), replace(SETTINGS, ingredients=Ingredients(online=True))]
    settings.append(replace(SETTINGS, training=(("l1", 30.0),)))
    settings.append(replace(SETTINGS, with_test=True))
    found = [json.dumps(one.fingerprint(task)) for one in settings]
    assert len(set(found)) == len(settings)
    assert found[0] == json.dumps(replace(SETTINGS).fingerprint(task))


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"epochs": 0}, "0 epochs; they need 1 or more"),
        ({"split": "train"}, "unknown split 'train'"),
        ({"workers": 0}, "0 workers"),
        ({"task": "edges2cats"}, "unknown task"),
        ({"weights": "nowhere.safetensors"}, "does not exist"),
    ],
)
def test_bad_input_is_a_sentence(change: dict[str, object], sentence: str, tmp_path: Path) -> None:
    arguments: dict[str, Any] = {"task": "edges2emoji", "weights": "dense", "epochs": 1, **change}
    workers = arguments.pop("workers", 1)
    with pytest.raises(UserError, match=sentence):
        run_trials(Settings(**arguments), [], tmp_path / "x.jsonl", workers=workers)
    assert not list(tmp_path.iterdir())


def test_only_new_trials_are_done(
    bench: Workbench, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, task: Task
) -> None:
    """Everything but the processes."""
    asked: list[list[str]] = []

    def work_off(make: object, jobs: list[Trial], keep: Callable[[TrialResult], None], **_: object) -> None:
        asked.append([job.label for job in jobs])
        for job in reversed(jobs):
            keep(bench(job))

    monkeypatch.setattr(trials, "work_off", work_off)
    monkeypatch.setattr(trials, "load_task", lambda *_: task)
    wanted = [Trial("a", PLAN, 0), Trial("b", OTHER, 0), Trial("a again", PLAN, 0)]
    log, told = tmp_path / "x.jsonl", []
    run_trials(SETTINGS, wanted[:1], log, on_done=told.append)
    found = run_trials(SETTINGS, wanted, log, on_done=told.append)
    assert asked == [["a"], ["b"]]
    assert [one.trial for one in told] == wanted[:2]
    assert [one.trial for one in found] == wanted
    assert found[0].row == found[2].row == told[0].row
    with pytest.raises(UserError, match="another finetuning"):
        run_trials(replace(SETTINGS, epochs=3), wanted, log)


def test_a_trial_that_diverges_stops_no_other_and_is_not_repeated(
    bench: Workbench, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, task: Task
) -> None:
    asked: list[str] = []

    def work_off(make: object, jobs: list[Trial], keep: Callable[[Any], None], **_: object) -> None:
        asked.extend(job.label for job in jobs)
        for job in jobs:
            keep(
                Failure(job, f"{job.label} burst")
                if job.label.startswith("bad")
                else result(job.label, job.plan)
            )

    monkeypatch.setattr(trials, "work_off", work_off)
    monkeypatch.setattr(trials, "load_task", lambda *_: task)
    bad, good = Trial("bad", PLAN, 0), Trial("good", OTHER, 0)
    log, told = tmp_path / "x.jsonl", []
    sentence = r"1 of 2 finetunings diverged, the others are kept in .*x\.jsonl; the first: bad burst"
    for _ in range(2):
        with pytest.raises(Diverged, match=sentence):
            run_trials(SETTINGS, [bad, good, bad], log, on_done=told.append)
    assert asked == ["bad", "good"]
    assert [one.trial.label for one in told] == ["good"]
    assert [one.trial.label for one in run_trials(SETTINGS, [good], log)] == ["good"]
    journal = TrialLog(log, SETTINGS.fingerprint(task))
    assert journal.diverged == {bad.key: "bad burst"}
    assert journal.known([bad, good]) == told
    said = Console(file=io.StringIO(), width=200)
    with trials.leaving_out_diverged(said):
        run_trials(SETTINGS, [bad], log)
    assert "left out: 1 of 1 finetunings diverged" in said.file.getvalue()  # type: ignore[attr-defined]


@pytest.mark.slow
def test_trials_in_processes_are_those_of_one(tmp_path: Path) -> None:
    """On the embedded task, with few images."""
    settings = Settings("edges2emoji", "elastic", 1, train_images=32, judge_images=16)
    generator, discriminator = (8, 20, 40, 80, 80, 80, 80, 76, 40, 20, 8), (22, 44, 90, 178)
    plan = Plan.of({"generator": generator, "discriminator": discriminator}, "l1")
    jobs = [Trial("uniform", plan, seed) for seed in (0, 1)]
    found = run_trials(settings, jobs, tmp_path / "x.jsonl")
    weights: Mapping[str, ElasticNetwork] = load_task("edges2emoji").shipped_elastic()
    alone = Workbench(load_task("edges2emoji"), weights, settings)
    assert [steady(one.row) for one in found] == [steady(alone(job).row) for job in jobs]
