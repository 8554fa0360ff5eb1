from __future__ import annotations

import itertools
import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import gan.tasks
from experiments import calibrate, cli, formulas, trials
from experiments.agreement import kendall, weighted_taus
from experiments.calibrate import StudyFolder, open_study, trials_of
from experiments.candidates import NamedPlan
from experiments.formulas import (
    FORMULAS,
    Bench,
    Case,
    Entry,
    Formula,
    Memo,
    Options,
    Rehearsal,
    Stage,
    View,
    beyond,
    luck,
    main,
)
from experiments.trials import Trial
from gan.checkpoints import state_hash
from gan.density import Neighbourhoods
from gan.errors import UserError
from gan.loop import trainable_copy
from gan.plans import Plan
from gan.tasks import Task
from gan.training import FINETUNING, Lessons, finetune
from tests.experiments.test_calibrate import OPTIONS, write_results, write_scores
from tests.gan.conftest import (
    Pair,
    _pair,
    fake_extractor,
    pair,
    task,
    tiny_discriminator,
    tiny_generator,
    tiny_pairs,
)

__all__ = ["Pair", "_pair", "pair", "task"]  # fixtures

PLAN = Plan.of({"generator": (4, 8, 8, 8, 4), "discriminator": (4, 6)}, "l1")


@pytest.fixture
def study(task: Task, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> StudyFolder:
    """A finished study of the tiny task, and what loads its parts."""
    for module in (calibrate, formulas, trials):
        monkeypatch.setattr(module, "load_task", lambda *_: task)
    for module in (gan.tasks, formulas, trials):
        monkeypatch.setattr(module, "load_extractor", lambda **_: fake_extractor())
    options, folder = open_study(replace(OPTIONS, output=tmp_path / "study"))
    plans = calibrate.read_plans(folder)
    write_scores(folder, options, task, plans)
    write_results(folder, trials_of(plans, 2))
    return folder


# What a plan is seen with


def test_a_memo_charges_everything_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a clock that is moved by hand: images take 4 seconds, features 2, a formula 1."""
    now = [0.0]
    monkeypatch.setattr(formulas, "time", SimpleNamespace(process_time=lambda: now[0]))
    memo, made = Memo(), []

    def spend(name: str, seconds: float, *needs: str) -> str:
        for need in needs:
            memo(need, parts[need])
        now[0] += seconds
        made.append(name)
        return name

    parts: dict[str, Any] = {
        "images": lambda: spend("images", 4),
        "features": lambda: spend("features", 2, "images"),
    }
    assert memo.cost(lambda: spend("a", 1, "features", "images")) == ("a", 7)
    assert memo.cost(lambda: spend("b", 1, "images", "features")) == ("b", 7)
    assert memo.cost(lambda: spend("c", 1, "images")) == ("c", 5)
    assert made == ["images", "features", "a", "b", "c"]


@pytest.mark.usefixtures("study")
def test_the_shipped_formulas_are_the_scorers() -> None:
    bench = Bench(OPTIONS)
    case = Case(bench, PLAN, "val", Memo())
    gaps = bench.scorer.score(PLAN).gaps
    for name, gap in (
        ("crowd, patches, ε = 0.3", "crowd_gap"),
        ("arrangement", "arrangement_gap"),
        ("MMD²", "mmd_gap"),
        ("L1", "l1_gap"),
        ("balance", "balance_gap"),
    ):
        assert FORMULAS[name].measure(case) == pytest.approx(gaps[gap], rel=1e-2), name
    parts = [FORMULAS[f"balance, {part} part"].measure(case) for part in ("first", "second")]
    assert sum(parts) == pytest.approx(FORMULAS["balance"].measure(case))
    assert min(parts) > 0


def a_case(monkeypatch: pytest.MonkeyPatch, made: Tensor, dense: Tensor, real: Tensor) -> Case:
    """A case whose features are given."""
    monkeypatch.setitem(formulas.SPACES, "head", lambda view: view.images)
    bench: Any = SimpleNamespace(memo=Memo())
    views = {
        name: View(bench, "val", name, lambda points=points: points, Memo())  # type: ignore[arg-type]
        for name, points in (("dense", dense), ("real", real))
    }
    bench.dense, bench.real = (lambda _, view=views[name]: view for name in ("dense", "real"))
    case = Case(bench, PLAN, "val", Memo())
    case.made = View(bench, "val", "made", lambda: made, case.memo)
    return case


def points(count: int = 24, dim: int = 3) -> Tensor:
    return torch.randn(count, dim, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


HEAD = [
    name
    for name, formula in FORMULAS.items()
    if formula.family == "density" and not any(word in name for word in (",", "K =", "signed", "real"))
]
"""Density formulas of the extractor's own features, held against the dense outputs."""


@pytest.mark.parametrize("name", [name for name in HEAD if name != "mixed up"])
def test_equal_outputs_have_no_gap(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = a_case(monkeypatch, points(), points(), points())
    assert FORMULAS[name].measure(case) == pytest.approx(0, abs=1e-9)


def test_the_parts_see_what_they_should(monkeypatch: pytest.MonkeyPatch) -> None:
    dense = points()
    shrunk = a_case(monkeypatch, dense / 2, dense, dense)
    value = {name: formula.measure for name, formula in FORMULAS.items()}
    assert value["arrangement, shrunk"](shrunk) == pytest.approx(math.log(2), rel=1e-4)
    assert value["arrangement, grown"](shrunk) == 0
    assert value["arrangement, without scale"](shrunk) == pytest.approx(0, abs=1e-4)
    assert value["own crowds, closer"](shrunk) == pytest.approx(math.log(2), rel=1e-4)
    assert value["own crowds, looser"](shrunk) == 0
    assert value["other neighbours, K = 7"](shrunk) == pytest.approx(0, abs=1e-6)
    turned = a_case(monkeypatch, dense.roll(1, 0), dense, dense)
    assert value["own crowds"](turned) > 0.05  # the same crowds, but of others
    assert value["mixed up"](turned) > value["mixed up"](a_case(monkeypatch, dense, dense, dense)) == 0
    assert value["uncovered dense balls, K = 5"](turned) == 0
    away = a_case(monkeypatch, dense + 5, dense, dense)
    assert value["uncovered dense balls, K = 5"](away) == 1
    for name in ("lost around dense", "lost around real", "away from real, signed"):
        assert value[name](away) > 1, name
    assert value["gained around dense"](away) == 0
    assert value["arrangement"](away) == pytest.approx(0, abs=1e-6)


def test_crowds_are_those_of_the_shipped_formula(monkeypatch: pytest.MonkeyPatch) -> None:
    dense = points()
    made = dense + 0.3 * points(24).flip(0)
    case = a_case(monkeypatch, made, dense, dense)
    halves = [FORMULAS[f"crowd around {side}"].measure(case) for side in ("dense", "pruned")]
    assert sum(halves) / 2 == pytest.approx(Neighbourhoods.build(dense).compare(made).crowd, rel=1e-4)


# Rehearsals


def test_a_rehearsal_is_the_beginning_of_a_finetuning() -> None:
    """Measured after an epoch and at the end, it has the weights that finetuning has there."""
    pairs, lessons = tiny_pairs(12), Lessons(tiny_generator(2))
    options = replace(FINETUNING, epochs=3, batch_size=4, seed=1)
    networks = tiny_generator(0, (4, 6, 8, 6, 4)), tiny_discriminator(1, (4, 6))
    whole, _ = finetune(*networks, lessons, pairs, options)
    seen: dict[int, Any] = {}
    torch.manual_seed(options.seed)
    generator, discriminator = (trainable_copy(network, amp=False) for network in networks)
    rehearsal = Rehearsal(
        generator, discriminator, options, lessons, pairs=pairs, marks=(2, 9), on_mark=seen.__setitem__
    )
    rehearsal.go()
    assert list(seen) == [2, 9]
    assert state_hash(seen[9]) == state_hash(whole)
    assert state_hash(seen[2]) != state_hash(whole)


def test_a_studys_rehearsals_are_the_beginning_of_its_own_finetuning(
    study: StudyFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With what finetuning adds to the native losses, too: without it they would rehearse something else."""
    own, _ = calibrate.reopen_study(calibrate.Options(resume=study.path, report=True), study.path)
    stage, plan = Stage(own), calibrate.read_plans(study)[0]
    bench = stage.bench
    options = bench.settings.options(stage.seed, bench.task)
    pair = bench.pair(Trial(plan.label, plan.plan, stage.seed))
    ingredients = bench.settings.ingredients
    trainer = bench.task.finetuner(*pair, bench.lessons(options), options, ingredients, bench.dense)
    finetuned, _ = trainer.pair(trainer.fit(bench.train))
    assert trainer.perceptual is not None

    seen: list[str] = []
    monkeypatch.setattr(stage, "figures", lambda network: seen.append(state_hash(network)) or {})
    stage(plan, (trainer.steps,), None)
    assert seen == [state_hash(finetuned)]


def test_a_short_one_has_a_schedule_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    rates: list[float] = []
    step = formulas.PairedTrainer.step

    def spy(self: Any, inputs: Tensor, targets: Tensor, learning_rate: float, *rest: Any) -> Any:
        rates.append(learning_rate)
        return step(self, inputs, targets, learning_rate, *rest)

    monkeypatch.setattr(formulas.PairedTrainer, "step", spy)
    options = replace(FINETUNING, epochs=50, batch_size=4, decay_from=0.5, learning_rate=1e-3)
    Rehearsal(
        tiny_generator(),
        tiny_discriminator(),
        options,
        Lessons(tiny_generator(2)),
        pairs=tiny_pairs(12),
        marks=(4,),
        on_mark=lambda *_: None,
        length=4,
    ).go()
    assert rates == pytest.approx([1e-3, 1e-3, 1e-3, 5e-4])


# The road and the report


KEPT = ("crowd", "MMD²", "L1", "balance")


def test_the_road_and_its_resume(study: StudyFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(formulas, "FORMULAS", {name: FORMULAS[name] for name in KEPT})
    monkeypatch.setattr(formulas, "MARKS", (1, 2, 3))
    monkeypatch.setattr(formulas, "SHORT", (2,))
    monkeypatch.setattr(formulas, "SPLITS", 10)
    options = Options(study.path, tmp_path / "found", ("instant",))
    main(options)
    log = tmp_path / "found" / "formulas.jsonl"
    plans = len(calibrate.read_plans(study))
    assert len(log.read_text().splitlines()) == 1 + plans * len(KEPT)
    before = log.read_bytes()

    wide = Formula("density", lambda case: float(-sum(case.plan["generator"])))
    monkeypatch.setitem(formulas.FORMULAS, "narrow", wide)
    main(replace(options, only="^narrow$"))
    assert log.read_bytes().startswith(before)
    added = [json.loads(line) for line in log.read_bytes()[len(before) :].splitlines()]
    assert {entry["formula"] for entry in added} == {"narrow"}
    assert len(added) == plans

    main(replace(options, parts=("rehearsals",)))
    rows = [json.loads(line) for line in log.read_text().splitlines()[1:]]
    assert {row["formula"] for row in rows} > {"2 steps: KID", "2 steps of their own: MMD²"}
    whole = log.read_bytes()
    main(Options(study.path, tmp_path / "found"))  # nothing is missing
    assert log.read_bytes() == whole
    found = json.loads((tmp_path / "found" / "formulas.json").read_text())
    table = {row["name"]: row for row in found["rows"]}
    assert {*KEPT, "narrow", "power law: KID", "total without density and recovery"} <= set(table)
    assert table["MMD²"]["like_mmd"] == pytest.approx(1)
    assert "1 beside fidelity and balance" in table["crowd"]["beside"]
    text = (tmp_path / "found" / "table.md").read_text()
    assert "## rehearsal" in text
    assert "| narrow | " in text


def test_taus_of_samples_are_those_written_out() -> None:
    random = np.random.default_rng(0)
    scores, metric = random.normal(size=(3, 9)).round(1), random.normal(size=9).round(1)
    counts = random.multinomial(9, np.full(9, 1 / 9), size=5).astype(float)
    taus = weighted_taus(scores, metric, counts)
    for (b, row), (v, score) in itertools.product(enumerate(counts), enumerate(scores)):
        sample = np.repeat(np.arange(9), row.astype(int))
        assert taus[b, v] == pytest.approx(kendall(score[sample], -metric[sample]))


def test_luck_tells_a_find_from_the_best_of_many() -> None:
    random = np.random.default_rng(0)
    metric = random.normal(size=30)
    base = -metric + 2 * random.normal(size=30)
    noise = random.normal(size=(40, 30))
    chance = luck([f"noise {n}" for n in range(40)], noise + 0.5 * base, base, metric)
    assert chance.gain < chance.chance
    assert chance.p > 0.05
    find = luck(["find", *(f"noise {n}" for n in range(40))], np.vstack([-metric, noise]), base, metric)
    assert find.name == "find"
    assert find.p < 0.05
    assert find.confirmed.value > 0.3
    assert find.chosen["find"] > 0.9


def test_what_is_beyond_is_told_from_chance() -> None:
    """A part of the metric that the held gap lacks is found; a copy of the gap and noise are not."""
    random = np.random.default_rng(1)
    held, missing = random.normal(size=(2, 30))
    metric = held + missing
    noise = [Entry(f"noise {n}", "density", random.normal(size=30), 0.1) for n in range(20)]
    copied = Entry("copy", "density", 3 * held, 0.1)
    found = beyond([*noise, copied, Entry("missing", "density", missing, 0.1)], held, metric)
    assert found.name == "missing"
    assert found.tau > found.chance
    assert found.p < 0.05
    nothing = beyond([*noise, copied], held, metric)
    assert nothing.name != "copy"
    assert nothing.p > 0.05


def test_few_plans_leave_no_holes_in_what_is_beyond() -> None:
    """Among five, a formula is soon the reverse of the gap, and a permuted metric in its order."""
    random = np.random.default_rng(1)
    held, metric = random.normal(size=(2, 5))
    tried = [Entry("reverse", "density", -held, 0.1), Entry("other", "density", random.normal(size=5), 0.1)]
    found = beyond(tried, held, metric)
    assert found.name == "other"
    assert np.isfinite([found.tau, found.chance]).all()
    assert found.tau == pytest.approx(beyond(tried[1:], held, metric).tau)


def test_an_entry_is_scored_like_a_reward_term() -> None:
    """0 = the first plan, which is the uniform one; units of the interquartile range / 1.349."""
    entry = Entry("a", "density", np.array([2.0, 1.0, 3.0, 100.0, 2.0]), 0.1)
    assert entry.score == pytest.approx([0, 1.349, -1.349, -5, 0])


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ("nowhere", "nowhere does not exist"),
        (".", "is no run folder"),
        ("STUDY --parts --output STUDY/plans.json", "cannot make the folder"),
        ("STUDY --only (", "is no regular expression"),
        ("STUDY --only nothing-like-it", "finds no formula; names are such as crowd"),
    ],
)
def test_bad_input_is_a_sentence(
    arguments: str, sentence: str, study: StudyFolder, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    given: Sequence[str] = [word.replace("STUDY", str(study.path)) for word in arguments.split()]
    with pytest.raises(SystemExit) as stopped:
        cli.run(main, Options, "", (), given)
    assert stopped.value.code == 2
    assert sentence in capsys.readouterr().err
    assert not (study.path / "formulas").exists()


def test_one_process_at_a_time_fills_the_log(study: StudyFolder, tmp_path: Path) -> None:
    """A second one looks in."""
    folder = tmp_path / "found"
    main(Options(study.path, folder, ()))
    with cli.alone(folder):
        with pytest.raises(UserError, match=f"another process is at work in {folder}"):
            main(Options(study.path, folder, ("instant",), only="^multiplications$"))
        main(Options(study.path, folder, ()))


def test_a_value_must_be_finite(study: StudyFolder, tmp_path: Path) -> None:
    journal = formulas.Journal(tmp_path / "formulas.jsonl", {})
    with pytest.raises(ValueError, match=r"crowd of plan .* is nan; it must be finite"):
        journal.append(PLAN, "crowd", math.nan, 0.1)
    plans: list[NamedPlan] = calibrate.read_plans(study)
    journal.append(plans[0].plan, "crowd", 1.0, 0.1)
    again = formulas.Journal(tmp_path / "formulas.jsonl", {})
    assert again.values == {(plans[0].plan.key, "crowd"): (1.0, 0.1)}
    with pytest.raises(UserError, match="was written with another weights"):
        formulas.Journal(tmp_path / "formulas.jsonl", {"weights": "other"})
