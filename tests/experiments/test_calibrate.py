from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from envs.references import References
from envs.rewards import Weights
from experiments import calibrate, cli
from experiments.build import build_budgets, prunable
from experiments.calibrate import KID, L1, Options, StudyFolder, open_study, report, score_files, trials_of
from experiments.candidates import NamedPlan
from experiments.figures import TERMS
from experiments.runs import read_json
from experiments.trials import Trial, TrialLog, TrialResult
from gan.errors import UserError
from gan.evaluations import FAMILIES, CountedScorer, EvaluationLog, Scores
from gan.files import write_json
from gan.plans import Plan
from gan.scoring import FORMULAS
from gan.surrogate import Scope, Surrogate, cautious, load_surrogate
from gan.tasks import Task
from tests.gan.conftest import Pair, _pair, pair, task

__all__ = ["Pair", "_pair", "pair", "task"]  # fixtures

OPTIONS = Options(task="tiny", budget="generator=0.6,discriminator=0.6", plans=8, elastic="dense")
NOISE = 1e-3


class FakeScorer:
    """Every gap but the MMD is the generator's number of channels; the MMD is made of all widths."""

    ranking = "l1"

    def __init__(self, task: Task) -> None:
        self.networks = prunable(task)
        self.fingerprint = {"weights": "w"}

    def score(self, plan: Plan) -> Scores:
        channels = sum(plan["generator"])
        return Scores({term: mmd(plan) if term == "mmd_gap" else channels for term in FAMILIES})


def mmd(plan: Plan) -> float:
    """Different for every plan."""
    widths = [*plan["generator"], *plan["discriminator"]]
    return float(np.dot(widths, np.sqrt(np.arange(2, 2 + len(widths)))))


def write_scores(folder: StudyFolder, options: Options, task: Task, plans: Sequence[NamedPlan]) -> None:
    scorer = FakeScorer(task)
    counted = CountedScorer(scorer, EvaluationLog(folder.evaluations("default"), scorer.fingerprint))
    References(counted, build_budgets(options.budget)).prepare()
    for named in plans:
        counted.score(named.plan)


def write_results(folder: StudyFolder, trials: Sequence[Trial]) -> None:
    """The finetuned KID follows the MMD, L1 its negative; seeds differ by a little."""
    log = TrialLog(folder.finetuned, {"task": "tiny"})
    for trial in trials:
        value = 1 + mmd(trial.plan) / 100 + NOISE * trial.seed
        row = {KID: value, L1: 10 - value}
        log.append(TrialResult(trial, {KID: 2 * value, L1: 1.0}, row, 0.0, 0.0, 1.0))


@pytest.fixture
def study(task: Task, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Options, StudyFolder]:
    """A study that is scored, but not finetuned."""
    monkeypatch.setattr(calibrate, "load_task", lambda *_: task)
    options, folder = open_study(replace(OPTIONS, output=tmp_path / "study"))
    write_scores(folder, options, task, calibrate.read_plans(folder))
    return options, folder


def test_a_report_finds_what_predicts(study: tuple[Options, StudyFolder]) -> None:
    options, folder = study
    write_results(folder, trials_of(calibrate.read_plans(folder), 2))
    report(options, folder, Console(quiet=True))
    found = json.loads(folder.calibration.read_text())
    predictors = {row["name"]: row for row in found["predictors"]}
    totals = {"total", *(f"total without {family}" for family in ("density", "fidelity", "balance"))}
    gaps = set(FAMILIES) - {"recovery_gap"}  # nothing is predicted without the dense pair's figures
    assert set(predictors) == {*gaps, *totals, f"raw {KID}", f"raw {L1}"}
    assert not folder.surrogate.exists()
    best = predictors["mmd_gap"]
    for where in ("all", "better_half"):
        assert best[KID][where]["tau"] == pytest.approx({"value": 1, "low": 1, "high": 1})
        assert best[KID][where]["regret"] == 0
    assert best[L1]["all"]["tau"] == pytest.approx({"value": -1, "low": -1, "high": -1})
    assert predictors["crowd_gap"][KID]["all"]["tau"]["value"] != pytest.approx(1)
    assert predictors[f"raw {KID}"][KID]["all"]["tau"]["value"] == pytest.approx(1)
    assert predictors[f"raw {L1}"][KID]["all"]["tau"]["value"] is None  # the same for all
    assert found["noise"][KID]["reliability"]["single"]["value"] > 0.99
    assert found["noise"][KID]["ceiling"]["value"] > 0.95
    plans = {row["label"]: row for row in found["plans"]}
    assert plans["uniform"]["predictors"]["default/total"] == 0
    assert len(plans["uniform"]["finetuned"][KID]) == 2
    assert len(plans) == 8
    assert found["notes"] == []
    families = found["families"]["additions"]
    assert set(families) == {"density", "fidelity", "balance"}
    gain = predictors["total"][KID]["all"]["tau"]["value"]
    gain -= predictors["total without density"][KID]["all"]["tau"]["value"]
    assert families["density"]["kid"]["value"] == pytest.approx(gain)
    table = folder.table.read_text()
    assert f"| density | {gain:+.2f} [" in table
    assert f"| {TERMS['mmd_gap']} | 1.00 [1.00, 1.00] | 1.00 [1.00, 1.00] | 0.0% |" in table
    with Image.open(folder.scatter) as figure:
        assert figure.width > 500
    assert folder.scatter.with_suffix(".pdf").read_bytes().startswith(b"%PDF")


def test_finished_plans_become_a_surrogate(study: tuple[Options, StudyFolder]) -> None:
    """Each plan is predicted by the others, and the file predicts what it has not seen."""
    options, folder = study
    write_results(folder, trials_of(calibrate.read_plans(folder), 2))
    write_json(folder.dense, {"row": {KID: 0.2}, "weights": "0123"})
    report(options, folder, Console(quiet=True))
    found = json.loads(folder.calibration.read_text())
    predictors = {row["name"]: row for row in found["predictors"]}
    assert {"recovery_gap", "total without recovery"} <= set(predictors)
    surrogate = load_surrogate(folder.surrogate)
    assert surrogate.scope.weights == "0123"
    assert len(surrogate.examples) == 8
    unseen = [cautious(*prediction) for prediction in surrogate.leave_one_out()]
    shown = [row["predictors"]["default/recovery_gap"] for row in found["plans"]]
    assert shown == pytest.approx(unseen)


def test_other_predictions_can_be_reported_on(study: tuple[Options, StudyFolder], tmp_path: Path) -> None:
    """Plans among their examples are predicted by the others, all others by all."""
    options, folder = study
    plans = calibrate.read_plans(folder)
    write_results(folder, trials_of(plans, 2))
    write_json(folder.dense, {"row": {KID: 0.2}, "weights": "0123"})
    report(options, folder, Console(quiet=True))
    own = load_surrogate(folder.surrogate)
    folder.surrogate.unlink()
    widened = own.examples[0].plan.replace("generator", [8, 8, 8, 8, 8])
    examples = [replace(own.examples[0], plan=widened, metric=0.9), *own.examples[1:]]
    given = Surrogate(examples, own.dense, own.channels, own.terms, own.scope)
    path = given.save(tmp_path / "given.json")
    report(replace(options, surrogate=path), folder, Console(quiet=True))
    shown = {
        row["label"]: row["predictors"]["default/recovery_gap"]
        for row in read_json(folder.calibration)["plans"]
    }
    assert shown[plans[0].label] == pytest.approx(
        given.gap(plans[0].plan, {"arrangement_gap": sum(plans[0].plan["generator"])})
    )
    assert shown[plans[3].label] == pytest.approx(cautious(*given.leave_one_out()[3]))
    assert not folder.surrogate.exists()


def test_predictions_for_another_study_are_refused_before_any_work(
    study: tuple[Options, StudyFolder], tmp_path: Path
) -> None:
    options, folder = study
    write_results(folder, trials_of(calibrate.read_plans(folder), 2))
    write_json(folder.dense, {"row": {KID: 0.2}, "weights": "0123"})
    report(options, folder, Console(quiet=True))  # writes predictions for the weights 0123
    new = replace(OPTIONS, surrogate=folder.surrogate, output=tmp_path / "new")
    with pytest.raises(UserError, match=r"surrogate\.json are for other networks, elastic weights or form"):
        open_study(new)
    assert not (tmp_path / "new").exists()
    with pytest.raises(UserError, match="are for other networks"):
        open_study(Options(resume=folder.path, surrogate=folder.surrogate))
    own = load_surrogate(folder.surrogate)
    scope = Scope("dense", KID, FORMULAS)
    fits = Surrogate(own.examples, own.dense, own.channels, own.terms, scope).save(tmp_path / "fits.json")
    opened, _ = open_study(replace(new, surrogate=fits))
    assert opened.surrogate == fits


def test_weights_change_the_total_and_nothing_else(study: tuple[Options, StudyFolder]) -> None:
    options, folder = study
    write_results(folder, trials_of(calibrate.read_plans(folder), 2))
    taus = {}
    for weights in (Weights(), Weights(density=0.0, fidelity=0.0, balance=1.0, recovery=0.0)):
        report(replace(options, weights=weights), folder, Console(quiet=True))
        rows = json.loads(folder.calibration.read_text())["predictors"]
        taus[weights.balance] = {row["name"]: row[KID]["all"]["tau"]["value"] for row in rows}
    assert taus[1.0]["total"] == pytest.approx(taus[1.0]["balance_gap"])
    assert taus[0.1]["total"] != taus[1.0]["total"]
    assert taus[0.1]["mmd_gap"] == taus[1.0]["mmd_gap"]
    assert not [name for name in taus[1.0] if name.startswith("total without")]


def test_an_unfinished_study_reports_what_is_there(study: tuple[Options, StudyFolder]) -> None:
    options, folder = study
    trials = trials_of(calibrate.read_plans(folder), 2)
    with pytest.raises(UserError, match=r"finetuned\.jsonl does not exist yet; go on with --resume"):
        report(options, folder, Console(quiet=True))
    write_results(folder, trials[:7])
    with pytest.raises(UserError, match="3 of 8 plans are finetuned with all 2 seeds; a report needs 4"):
        report(options, folder, Console(quiet=True))
    write_results(folder, trials[7:11])
    (folder.path / "evaluations-half.jsonl").write_text('{"format": 1, "weights": "v"}\n')
    report(options, folder, Console(quiet=True))
    found = json.loads(folder.calibration.read_text())
    assert len(found["plans"]) == 5
    assert found["notes"][0] == "5 of 8 plans are finished"
    assert "evaluations-half.jsonl has no scores of" in found["notes"][1]


@pytest.mark.parametrize("line", ["", "[]", "3", "null", '{"format": 1'])
def test_a_log_without_a_header_is_refused(study: tuple[Options, StudyFolder], line: str) -> None:
    options, folder = study
    write_results(folder, trials_of(calibrate.read_plans(folder), 2))
    folder.evaluations("default").write_text(line)
    with pytest.raises(UserError, match=r"evaluations\.jsonl is no log: its first line is no header"):
        report(options, folder, Console(quiet=True))


def test_a_report_does_no_work(study: tuple[Options, StudyFolder], monkeypatch: pytest.MonkeyPatch) -> None:
    options, folder = study
    write_results(folder, trials_of(calibrate.read_plans(folder), 2))
    monkeypatch.setattr(calibrate, "work", lambda *_: pytest.fail("it worked"))
    logs = [path.read_bytes() for path in sorted(folder.path.glob("*.jsonl"))]
    calibrate.main(Options(resume=folder.path, report=True))
    assert [path.read_bytes() for path in sorted(folder.path.glob("*.jsonl"))] == logs
    assert folder.table.exists()
    assert options.plans == 8


def test_resume_takes_the_study_s_own_options(study: tuple[Options, StudyFolder]) -> None:
    own, folder = study
    weights = Weights(density=0.5)
    again, same = open_study(
        Options(resume=folder.path, workers=3, weights=weights, score_with=("raw=dense",))
    )
    assert same == folder
    assert again == replace(
        own, resume=folder.path, workers=3, weights=weights, score_with=("raw=dense",), output=again.output
    )
    assert read_json(folder.path / "options.json")["score_with"] == ["raw=dense"]
    assert read_json(folder.path / "options.json")["workers"] == 2
    with pytest.raises(UserError, match="'raw' are other weights in this study: dense"):
        open_study(Options(resume=folder.path, score_with=("raw=elastic",)))
    with pytest.raises(UserError, match="--report does no new work"):
        open_study(Options(resume=folder.path, report=True, score_with=("raw=dense",)))
    with pytest.raises(UserError, match="leave out --plans, --epochs"):
        open_study(Options(resume=folder.path, plans=9, epochs=3))


def test_score_files() -> None:
    found = score_files(["a=x.safetensors", "b=dense"])
    assert found == {"a": str(Path("x.safetensors").resolve()), "b": "dense"}
    for wrong in (["a"], ["=x"], ["a="], ["a/b=x"], ["default=x"], ["a=x", "a=y"]):
        with pytest.raises(UserError, match="--score-with"):
            score_files(wrong)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ("--task edges2cats", "unknown task 'edges2cats'"),
        ("--budget 0.00001", "cannot be reached"),
        ("--budget 0.1:0.5", "is a range"),
        ("--plans 3", "--plans is 3; it must be 4 or more"),
        ("--seeds 1", "--seeds is 1; it must be 2 or more"),
        ("--epochs 0", "--epochs is 0"),
        ("--seed -1", "--seed is -1"),
        ("--workers 0", "--workers is 0"),
        ("--output .", "exists"),
        ("--elastic nowhere.safetensors", "nowhere.safetensors does not exist"),
        ("--score-with new=nowhere.safetensors", "nowhere.safetensors does not exist"),
        ("--found nowhere", "nowhere does not exist"),
        ("--report", "--report needs the study"),
        ("--resume nowhere", "nowhere does not exist"),
        ("--weights.density -1", "at least 0"),
    ],
)
def test_bad_input_is_a_sentence(arguments: str, sentence: str, refused: Callable[..., None]) -> None:
    refused(calibrate.main, Options, arguments.split(), sentence)


@pytest.mark.slow
def test_the_whole_road_and_its_resume(tmp_path: Path) -> None:
    folder = StudyFolder(tmp_path / "study")
    arguments = ["--quick", "--elastic", "dense", "--output", str(folder.path)]
    cli.run(calibrate.main, Options, "", (), arguments)
    first = json.loads(folder.calibration.read_text())
    lines = folder.finetuned.read_text().splitlines(keepends=True)
    folder.finetuned.write_text("".join(lines[:-1]) + lines[-1][:30])  # killed while it wrote
    cli.run(calibrate.main, Options, "", (), ["--resume", str(folder.path)])
    second = json.loads(folder.calibration.read_text())
    assert second["predictors"] == first["predictors"]
    assert second["plans"] == first["plans"]
