from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from rich.console import Console

from agents.registry import AGENTS
from experiments import cli, compare, comparison, comparison_pace
from experiments.compare import Options, product
from experiments.comparison import Place, RunOptions, Searcher, Study
from experiments.comparison_pace import Countdown, Pace, Scale, forecast, missing_jobs, shared, span
from experiments.comparison_report import Outcome, finetuned_rows, write_report
from experiments.trials import Settings, Trial, TrialLog, TrialResult
from gan.evaluation import COLUMNS, KID
from gan.plans import Plan
from tests.experiments.test_comparison import ToyTask
from tests.experiments.test_comparison import study as study

BUDGETS = ("generator=0.1,discriminator=0.5", "generator=0.2,discriminator=0.5")
BALANCE_ALONE = [f"--weights.{family}=0" for family in ("density", "fidelity", "recovery")]
GIVEN = ["--algos", "random", "uniform", "--evaluations", "30", "--seeds", "2"]


@dataclass
class Work:
    """Stand-ins for worker processes and for finetuning: counts both, and can be interrupted."""

    jobs: list[str] = field(default_factory=list)
    trials: list[Trial] = field(default_factory=list)
    stop_after: int | None = None

    def work_off(
        self, make: Callable[[], Callable[[Any], Any]], jobs: Sequence[Any], *, keep: Any, **_: Any
    ) -> None:
        do = make()
        for job in jobs:
            if len(self.jobs) == self.stop_after:
                raise KeyboardInterrupt
            done = do(job)
            self.jobs.append(done.name)
            keep(done)

    def run_trials(
        self, settings: Settings, trials: Sequence[Trial], log: Path, *, on_done: Any, **_: Any
    ) -> list[TrialResult]:
        assert settings.split == "test"
        journal = TrialLog(log, settings.fingerprint(None))  # type: ignore[arg-type]
        for trial in trials:
            if trial.key in journal.results:
                continue
            # the wider the first group, the better; raw slices are far worse
            raw = 5.0 if log.stem.endswith("-dense") else 0.0
            row = dict.fromkeys(COLUMNS, 1.0) | {KID: 2.0 + raw - 0.01 * trial.plan["generator"][0]}
            steps = tuple(2.0 + 0.1 * np.sin(np.arange(50) / 5 + trial.seed))
            spread = 0.1 if trial.discriminator == "pruned" else 0.3
            journal.append(TrialResult(trial, row, row, 2.0, spread, 60.0, steps))
            self.trials.append(trial)
            on_done(journal.results[trial.key])
        return journal.known(trials)


@pytest.fixture
def work(study: Study, monkeypatch: pytest.MonkeyPatch) -> Work:
    work = Work()
    monkeypatch.setattr(compare, "work_off", work.work_off)
    monkeypatch.setattr(compare, "run_trials", work.run_trials)
    monkeypatch.setattr(compare, "load_task", lambda *_: None)
    monkeypatch.setattr(compare, "check_reachable", lambda *_: None)
    monkeypatch.setattr(comparison_pace, "load_task", lambda *_: None)
    monkeypatch.setattr(comparison_pace, "probe", lambda *_: Pace(0.5, 60.0, 0.2))
    monkeypatch.setattr(Settings, "fingerprint", lambda *_: {"task": "toy"})
    return work


def call(*arguments: str) -> None:
    cli.run(compare.main, Options, "", (), arguments)


def options(**given: Any) -> Options:
    return Options(**given).resolved


def test_the_product_is_in_full_and_seed_by_seed() -> None:
    runs = list(product(options(algos=("mappo", "random"), budgets=BUDGETS, seeds=2)))
    assert [(run.seed, run.budget, run.algo) for run in runs] == [
        (seed, budget, algo) for seed in (0, 1) for budget in BUDGETS for algo in ("mappo", "random")
    ]
    assert len({(run.cell, run.name) for run in runs}) == 8


def test_every_learner_of_the_registry_by_default() -> None:
    runs = list(product(options(seeds=1)))
    assert [run.algo for run in runs] == list(compare.LEARNERS)
    assert {run.variant for run in runs} == {"full"}


def test_variants_that_change_nothing_are_left_out() -> None:
    runs = list(product(options(algos=("mappo",), variants=("all",), seeds=1)))
    names = [run.variant for run in runs]
    assert "final_reward" not in names
    assert set(compare.ABLATIONS) - set(names) == {"final_reward"}
    stepwise = [run.variant for run in product(options(variants=("all",), reward="step", algos=("mappo",)))]
    assert "step_reward" not in stepwise
    both = list(product(options(algos=("ippo", "mappo"), variants=("full", "own_critics"), seeds=1)))
    assert [run.label for run in both] == ["ippo", "mappo"]
    both = list(product(options(algos=("mappo", "ippo"), variants=("full", "own_critics"), seeds=1)))
    assert [run.label for run in both] == ["mappo", "ippo"]
    # all that can be said of the rule is which discriminator stands beside it, and what it is cut from
    rule = list(product(options(algos=("uniform",), variants=("all",), seeds=1)))
    assert [run.variant for run in rule if run.algo == "uniform"] == [
        *("full", "whole_discriminator", "raw_weights")
    ]
    twice = list(product(options(algos=("mappo", "mappo"), budgets=(BUDGETS[0],) * 2, seeds=1)))
    assert [run.label for run in twice] == ["mappo"]


def test_a_comparison_of_two(work: Work, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "made"
    call(*GIVEN, "--budgets", *BUDGETS, "--finetuning-seeds", "2", "--output", str(output))
    printed = capsys.readouterr().out
    assert "at most about" in printed
    assert "8/8" in printed

    runs = pd.read_csv(output / "runs.csv")
    assert len(runs) == 8
    assert set(runs["label"]) == {"random", "uniform"}
    uniform, random = (runs[runs["label"] == label] for label in ("uniform", "random"))
    assert (uniform["score"] == 0).all()
    assert (random["score"] > 0).all()
    assert (uniform["kid_change"] == 0).all()
    np.testing.assert_allclose(runs["generator.share"] + runs["discriminator.share"], runs["score"])

    curves = pd.read_csv(output / "curves.csv")
    assert len(curves) == 8 * 30
    last = curves[curves["evaluations"] == 30].set_index(["cell", "label", "seed"])["score"]
    assert last.to_dict() == runs.set_index(["cell", "label", "seed"])["score"].to_dict()
    grown = curves.groupby(["cell", "label", "seed"])["score"].agg(lambda row: row.is_monotonic_increasing)
    assert grown.all()

    finetuned = pd.read_csv(output / "finetuned.csv")
    assert len(finetuned) == 8 * 2 + 2 * 2  # and the uniform plans of both cells
    # equal plans once: every uniform run's is the uniform plan
    assert len(work.trials) == len({trial.key for trial in work.trials}) == 4 * 2 + 2 * 2

    report = (output / "report.md").read_text()
    assert report.count("| random | ") >= 3
    assert "## all cells" in report
    for name in ("scores", "improvement", "finetuned", "improvement_kid", "balance"):
        with Image.open(output / f"{name}.png") as image:
            assert image.width > 300
        assert (output / f"{name}.pdf").read_bytes().startswith(b"%PDF")


def test_an_interrupted_comparison_goes_on_and_grows(
    work: Work, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "made"
    work.stop_after = 3  # the references and two searches
    with pytest.raises(SystemExit) as stopped:
        call(*GIVEN, "--output", str(output))
    assert stopped.value.code == 130
    assert f"--resume {output}" in capsys.readouterr().err
    work.stop_after = None
    call("--resume", str(output))
    assert "2 of them are done" in capsys.readouterr().out
    assert len(work.jobs) == len(set(work.jobs)) == 1 + 4
    trained = len(work.trials)
    call("--resume", str(output), "--seeds", "3")
    assert len(work.jobs) == len(set(work.jobs)) == 1 + 6
    assert len(work.trials) == trained + 1  # one random plan more; uniform's is known
    assert set(pd.read_csv(output / "runs.csv")["seed"]) == {0, 1, 2}
    with pytest.raises(SystemExit):
        call("--resume", str(output), "--evaluations", "10")
    assert "leave out --evaluations" in capsys.readouterr().err
    for given in (["--evaluations", "300"], ["--evaluations=300"]):  # the default, and not what it began with
        with pytest.raises(SystemExit):
            call("--resume", str(output), *given)
        assert "leave out --evaluations" in capsys.readouterr().err


def test_ablations_beside_the_full_method(work: Work, tmp_path: Path) -> None:
    output = tmp_path / "made"
    variants = ("full", "whole_discriminator", "without_balance", "raw_weights")
    given = ["--algos", "random", "--variants", *variants, "--evaluations", "20", "--seeds", "1"]
    call(*given, "--output", str(output))
    runs = pd.read_csv(output / "runs.csv").set_index("variant")
    assert set(runs.index) == set(variants)
    assert runs.loc["whole_discriminator", "margin_spread"] == 0.3
    assert runs.loc["full", "margin_spread"] == 0.1
    report = (output / "report.md").read_text()
    assert "| random, whole discriminator | 1 |" in report
    assert sorted(path.name for path in (output / "finetuned").iterdir()) == [
        "edges2emoji-dense.jsonl",
        "edges2emoji-elastic.jsonl",
    ]


def test_what_one_looks_for_is_drawn_of_many_margins(work: Work, tmp_path: Path) -> None:
    output = tmp_path / "made"
    variants = ("without_balance", "without_density", "full", "whole_discriminator")
    given = ["--algos", "random", "uniform", "--evaluations", "20", "--seeds", "1"]
    call(*given, "--variants", *variants, "--output", str(output))
    labels = set(pd.read_csv(output / "runs.csv")["label"])
    (line,) = (line for line in (output / "report.md").read_text().splitlines() if "Not drawn" in line)
    left_out = set(line.partition(": ")[2].partition(". ")[0].split("; "))
    drawn = {"random, whole discriminator", "uniform, whole discriminator", "uniform"}
    assert left_out < labels
    assert not left_out & drawn
    assert len(labels - left_out) == 4


def test_raw_weights_are_held_against_the_uniform_plan_of_all(work: Work, tmp_path: Path) -> None:
    given = ["--algos", "random", "--evaluations", "20", "--seeds", "1", "--variants", "raw_weights"]
    for more in ((), ("full",)):
        output = tmp_path / f"made{len(more)}"
        call(*given, *more, "--output", str(output))
        runs = pd.read_csv(output / "runs.csv").set_index("variant")
        finetuned = pd.read_csv(output / "finetuned.csv")
        (uniform,) = finetuned.loc[finetuned["label"] == "uniform plan", KID]
        assert uniform < 2
        assert (runs["kid_uniform"] == uniform).all()
        assert runs.loc["raw_weights", "kid_change"] > 1


def test_every_warm_up_has_a_uniform_plan_of_its_own() -> None:
    plan = Plan.of({"generator": (4,), "discriminator": (2,)}, "l1")

    def outcome(seed: int, kid: float) -> Outcome:
        row = dict.fromkeys(COLUMNS, 1.0) | {KID: kid}
        return Outcome(RunOptions(seed=seed), {}, (), (TrialResult(Trial("", plan, 0), row, row, 2, 0, 1),))

    # seeds 0 and 1 share their weights, 2 was warmed up by itself
    rows = finetuned_rows([outcome(0, 0.3), outcome(1, 0.3), outcome(2, 0.4)])
    assert list(rows[KID]) == [0.3, 0.4]


def test_nothing_is_finetuned_unasked(work: Work, tmp_path: Path) -> None:
    output = tmp_path / "made"
    given = ["--algos", "random", "--evaluations", "20", "--seeds", "1", "--finetuning-seeds", "0"]
    call(*given, "--output", str(output))
    assert work.trials == []
    assert not (output / "finetuned.csv").exists()
    assert KID not in pd.read_csv(output / "runs.csv")
    assert "After finetuning" not in (output / "report.md").read_text()


def test_only_the_plan(work: Work, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    call(*GIVEN, "--workers", "1", "--only-plan", "--output", str(tmp_path / "made"))
    # references 65 × 0.5 s, searches 2 × (30 + 1) × 0.5 s, 4 + 1 finetunings of 60 s
    assert "about 6 min with 1 worker" in capsys.readouterr().out
    assert not (tmp_path / "made").exists()


def test_forecasts_know_what_is_done(work: Work, study: Study) -> None:
    runs = list(product(options(algos=("random",), seeds=3, evaluations=20)))
    scale = Scale(workers=2, finetuning_seeds=2)

    def pace(_: str) -> Pace:
        return Pace(0.5, 60.0, 0.2)

    # 32.5 s of references by one worker; 3 searches of 10 s and (3 + 1) × 2 finetunings by two
    assert forecast(study, runs, scale, pace) == {
        "warm-ups": 0.0,
        "references": 32.5,
        "searches": 20.0,
        "finetuning": 240.0,
    }
    searcher = Searcher(study)
    for job in (study.place(runs[0]), *runs):
        searcher(job)
    assert not any(missing_jobs(study, runs).values())
    left = forecast(study, runs, scale, pace)
    assert (left["references"], left["searches"]) == (0.0, 0.0)
    assert left["finetuning"] == 240.0  # three different plans and the uniform one
    # an interrupted search has its evaluations; what is left is to judge what it found
    study.result(runs[0]).unlink()
    assert forecast(study, runs, scale, pace)["searches"] == 0.5
    log = study.run(runs[0]).evaluations
    lines = log.read_text().splitlines(keepends=True)
    paid = [number for number, line in enumerate(lines) if json.loads(line).get("counted")]
    log.write_text("".join(lines[: paid[15]]))
    assert forecast(study, runs, scale, pace)["searches"] == 2.5
    own = Study(study.path, study.weights, warm_up=100)
    assert forecast(own, runs, scale, pace)["warm-ups"] == 40.0  # three seeds of 20 s


def test_jobs_side_by_side_are_counted_down_by_their_own_time() -> None:
    console = Console(record=True, width=200)
    countdown = Countdown(console, 5, "searches", 2)
    for seconds in (100.0, 200.0):  # 3 of 150 s are left: two rounds of two workers
        countdown.tick("one", "done", seconds)
    first, second = console.export_text().splitlines()
    assert first.endswith("1/5 one: done, 100 s; about 3 min of searches left")
    assert second.endswith("2/5 one: done, 200 s; about 5 min of searches left")
    for _ in range(3):
        countdown.tick("one", "done", 100.0)
    assert "about 0 s of searches left" in console.export_text()


def test_shares_and_spans() -> None:
    assert shared([10.0, 2.0, 3.0], 4) == 10.0
    assert shared([10.0, 10.0, 10.0], 2) == 20.0
    assert shared([], 2) == 0.0
    assert [span(seconds) for seconds in (12.4, 600.0, 12000.0)] == ["12 s", "10 min", "3.3 h"]


def test_one_warm_up_for_a_task_and_seed(
    study: Study, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(comparison, "load_task", lambda *_: ToyTask(None))  # type: ignore[arg-type]
    runs = list(product(options(algos=("random", "mappo"), budgets=BUDGETS, seeds=2)))
    jobs = missing_jobs(study, runs)["warm-ups"]
    assert [(job.seed, job.budgets) for job in jobs] == [(0, BUDGETS), (1, BUDGETS)]  # type: ignore[union-attr]
    assert {job.steps for job in jobs} == {1200}  # type: ignore[union-attr]
    assert study.place(runs[0]) == Place(
        "edges2emoji", "params", BUDGETS[0], str(study.path / "elastic/edges2emoji-s0.safetensors")
    )
    assert study.place(RunOptions(start="dense")).weights == "dense"


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--algos", "mapo"], "did you mean 'mappo'"),
        (["--variants", "no_feedbak"], "did you mean 'no_feedback'"),
        (["--algos", "random", "--budgets", "0.05:0.5"], "range"),
        (["--seeds", "0"], "--seeds is 0"),
        (["--finetuning-seeds", "-1"], "--finetuning-seeds is -1"),
        (["--evaluations", "0"], "--evaluations is 0"),
        (["--workers=-2"], "--workers is -2"),
        (["--variants", "without_balance", *BALANCE_ALONE], "reward weights"),
    ],
)
def test_bad_input_is_a_sentence(
    arguments: list[str], sentence: str, work: Work, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        call(*arguments, "--output", str(tmp_path / "made"))
    assert stopped.value.code == 2
    assert sentence in capsys.readouterr().err
    assert not (tmp_path / "made").exists()


def test_results_need_a_folder_of_their_own(
    work: Work, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for arguments, sentence in ((GIVEN, "--output FOLDER"), ([*GIVEN, "--output", str(tmp_path)], "exists")):
        with pytest.raises(SystemExit):
            call(*arguments)
        assert sentence in capsys.readouterr().err


@pytest.mark.slow
def test_the_whole_road(tmp_path: Path) -> None:
    output = tmp_path / "made"
    call("--algos", "random", "--seeds", "1", "--quick", "--output", str(output))
    row = pd.read_csv(output / "runs.csv").iloc[0]
    assert (row["evaluations"], row["n_images"]) == (24, 64)
    assert json.loads((output / "options.json").read_text())["evaluations"] == 24


def test_labels_beyond_what_a_figure_shows_are_named(tmp_path: Path) -> None:
    """All labels stay in the tables, and the worst are not drawn."""
    algos = sorted(set(AGENTS) - {"uniform"})[:9]
    variants = ("full", "without_balance")
    outcomes = []
    for place, (algo, variant) in enumerate(itertools.product(algos, variants)):
        curve = {"evaluations": [1, 20], "score": [0.0, float(place)]}
        scores = {"score": float(place), "own_score": 0.0, "proposed_score": 0.0, "evaluations": 20}
        rest = {"requests": 20, "seconds": 1.0, "scores": {}, "plan": {"widths": {}}, "curve": curve}
        run = RunOptions(algo=algo, variant=variant, evaluations=20)
        outcomes.append(Outcome(run, {**scores, **rest}))
    write_report(tmp_path, outcomes, "A protocol.")
    assert (tmp_path / "scores.png").is_file()
    text = (tmp_path / "report.md").read_text()
    labels = [one.run.label for one in outcomes]
    assert f"Not drawn, for more curves cannot be told apart: {labels[1]}; {labels[0]}." in text
    assert all(f"| {label} |" in text for label in labels)
