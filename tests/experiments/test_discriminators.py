from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import gan.tasks
from experiments import discriminators
from experiments.discriminators import FULL, KID, LARGEST, MEAN, SMALLEST, Options
from experiments.trials import Settings, Trial, TrialResult
from gan.cost import DEFAULT_COST
from gan.tasks import Task
from tests.gan.conftest import Pair, _pair, fake_extractor, pair, task

__all__ = ["Pair", "_pair", "pair", "task"]  # fixtures

OPTIONS = Options(
    task="tiny", budget="generator=0.6,discriminator=0.6", shares=(1.0, 0.8), elastic="dense", quick=True
)


def fake_trials(
    settings: Settings, trials: Sequence[Trial], log: Path, *, on_done: Any, **_: Any
) -> list[TrialResult]:
    """KID falls by 0.1 beside a slice; seeds differ by 1."""
    assert settings.split == "val"
    results = []
    for trial in trials:
        kid = 2.0 + trial.seed - (0.1 if trial.discriminator == "pruned" else 0.0)
        row = {KID: kid, "l1": 0.2, "prdc_coverage": 0.5, "balance_gap": 0.3}
        results.append(TrialResult(trial, row, row, 1.0, 0.25, 10.0))
        on_done(results[-1])
    return results


@pytest.fixture
def tiny(task: Task, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(discriminators, "load_task", lambda *_: task)
    monkeypatch.setattr(discriminators, "run_trials", fake_trials)
    monkeypatch.setattr(gan.tasks, "load_extractor", lambda **_: fake_extractor())


@pytest.mark.usefixtures("tiny")
def test_the_road_and_its_resume(tmp_path: Path) -> None:
    output = tmp_path / "study"
    discriminators.main(replace(OPTIONS, output=output))
    pairs = json.loads((output / "plans.json").read_text())
    assert list(pairs) == ["uniform", "pyramid"]
    for content in pairs.values():
        plans = content["plans"]
        assert list(plans) == [FULL, "even 1", "even 0.8", "even 0.6", SMALLEST, LARGEST]
        assert len({tuple(plan["widths"]["generator"]) for plan in plans.values()}) == 1
        assert plans[FULL]["widths"] == plans["even 1"]["widths"]
    found = json.loads((output / "discriminators.json").read_text())
    assert list(found["rows"]) == ["uniform", "pyramid", MEAN]
    row = found["rows"]["pyramid"]["even 0.8"]
    assert row["to_full"] == pytest.approx([-0.1, -0.1, -0.1])
    assert row["to_even"] == pytest.approx([0, 0, 0])
    assert row["kid"] == pytest.approx([1.9, 2.9])
    assert 0.6 < row["means"]["cost"] <= 0.8
    assert (output / "discriminators.png").read_bytes().startswith(b"\x89PNG")
    assert (output / "discriminators.pdf").read_bytes().startswith(b"%PDF")
    before = (output / "table.md").read_text(), (output / "plans.json").read_bytes()
    discriminators.main(Options(resume=output))
    assert ((output / "table.md").read_text(), (output / "plans.json").read_bytes()) == before


def test_each_seed_begins_with_another_discriminator() -> None:
    plan = {"widths": {"generator": [4], "discriminator": [2]}, "ranking": "l1"}
    pairs = {"uniform": {"plans": {FULL: plan, "even 1": plan, "even 0.5": plan}}}
    trials = discriminators.trials_of(pairs, 3)
    assert [label for _, label, _ in trials][::3] == [FULL, "even 1", "even 0.5"]
    assert {t.discriminator for (_, label, _), t in trials.items() if label == FULL} == {"dense"}
    assert len({trial.key for trial in trials.values()}) == 6  # equal slices are finetuned once


def test_budgets_are_of_the_default_cost() -> None:
    assert Options().cost == DEFAULT_COST


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ("--seeds 1", "--seeds is 1; it must be 2 or more"),
        ("--epochs 0", "--epochs is 0"),
        ("--workers 0", "--workers is 0"),
        ("--budget 0.1:0.5", "is a range"),
        ("--shares 0.0000001 --budget 0.3", "cannot be reached"),
        ("--shares 2 --budget 0.3", "at most 1"),
        ("--found nowhere --budget 0.3 --shares 0.5", "nowhere does not exist"),
        ("--resume nowhere", "nowhere does not exist"),
    ],
)
@pytest.mark.usefixtures("tiny")
def test_bad_input_is_a_sentence(arguments: str, sentence: str, refused: Callable[..., None]) -> None:
    refused(discriminators.main, Options, ["--elastic", "dense", *arguments.split()], sentence)


def test_the_generators_share_must_be_within_the_discriminators_reach(refused: Callable[..., None]) -> None:
    """An even discriminator is cut to it, too."""
    budget = "generator=0.0006,discriminator=0.5"  # the smallest plans keep 0.00058 and 0.00062
    refused(discriminators.main, Options, ["--budget", budget], "of the discriminator's params cannot be")
