from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import gan.tasks
from experiments import headroom, sweep
from experiments.sweep import KID, Options
from experiments.trials import Settings, Trial, TrialResult
from gan.errors import UserError
from gan.tasks import Task
from tests.gan.conftest import Pair, _pair, fake_extractor, pair, task

__all__ = ["Pair", "_pair", "pair", "task"]  # fixtures

OPTIONS = Options(
    task="tiny", shares=(0.8, 0.5), discriminator=0.8, algo="random", evaluations=4, seeds=2, quick=True
)


def fake_trials(
    settings: Settings, trials: Sequence[Trial], log: Path, *, on_done: Any, **_: Any
) -> list[TrialResult]:
    """KID falls with the channels that are kept; slices of dense weights are worse by 1."""
    results = []
    for trial in trials:
        kid = 9.0 - sum(trial.plan["generator"]) / 100 + (settings.weights == "dense") + 0.5 * trial.seed
        row = {KID: kid, "l1": 0.2, "prdc_coverage": 0.5}
        results.append(TrialResult(trial, row, row, 1.0, 0.25, 10.0))
        on_done(results[-1])
    return results


@pytest.fixture
def tiny(task: Task, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (sweep, headroom):
        monkeypatch.setattr(module, "load_task", lambda *_: task)
    monkeypatch.setattr(sweep, "run_trials", fake_trials)
    monkeypatch.setattr(Task, "shipped_elastic", lambda self: self.ordered())
    monkeypatch.setattr(gan.tasks, "load_extractor", lambda **_: fake_extractor())
    monkeypatch.setitem(sweep.dense_row.__globals__, "load_extractor", lambda **_: fake_extractor())


def widths(content: Mapping[str, Any], name: str) -> list[int]:
    return content["plans"][name]["widths"]["generator"]


@pytest.mark.usefixtures("tiny")
def test_the_road_and_its_resume(tmp_path: Path) -> None:
    output = tmp_path / "study"
    sweep.main(replace(OPTIONS, output=output))
    found = json.loads((output / "sweep.json").read_text())
    assert list(found["rows"]) == ["uniform", "found", "l1_slice"]
    plans = {share: json.loads((output / f"macs-{share}" / "plans.json").read_text()) for share in (0.8, 0.5)}
    assert sum(widths(plans[0.5], "uniform")) < sum(widths(plans[0.8], "uniform"))
    for share, content in plans.items():
        kid = [row[KID] for row in found["rows"]["found"][f"{share:g}"]]
        first = 9.0 - sum(widths(content, "found")) / 100
        assert kid == pytest.approx([first, first + 0.5])  # a seed each, in their order
        sliced, even = (found["rows"][name][f"{share:g}"][0][KID] for name in ("l1_slice", "uniform"))
        assert sliced == pytest.approx(even + 1)
    assert (output / "sweep.png").read_bytes().startswith(b"\x89PNG")
    assert (output / "sweep.pdf").read_bytes().startswith(b"%PDF")
    before = (output / "table.md").read_text()
    assert [line.split(" | ")[0] for line in before.splitlines()[-3:]] == ["| dense", "| 80.0%", "| 50.0%"]
    sweep.main(Options(resume=output))
    assert (output / "table.md").read_text() == before


def test_val_images_without_counterparts_are_refused(
    tmp_path: Path, task: Task, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of an unpaired task, whose test images do have them."""
    unpaired = replace(task, val=replace(task.val, partners=False))
    monkeypatch.setattr(sweep, "load_task", lambda *_: unpaired)
    monkeypatch.setattr(Task, "shipped_elastic", lambda self: self.ordered())
    with pytest.raises(UserError, match="the val images of tiny have no true counterparts"):
        sweep.open_sweep(replace(OPTIONS, split="val", output=tmp_path / "study"))
    sweep.open_sweep(replace(OPTIONS, split="test", output=tmp_path / "study"))


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ("--seeds 0", "--seeds is 0; it must be 1 or more"),
        ("--workers 0", "--workers is 0"),
        ("--evaluations 0", "--evaluations is 0"),
        ("--algo mapo", "'mapo'"),
        ("--shares 0.5 0.5", "each once"),
        ("--shares 0.5 0.5000000001", "each once"),
        ("--seed 99999999999", "below 2^32"),
        ("--shares 0.0000001", "cannot be reached"),
        ("--shares 2", "at most 1"),
        ("--resume nowhere", "nowhere does not exist"),
    ],
)
@pytest.mark.usefixtures("tiny")
def test_bad_input_is_a_sentence(arguments: str, sentence: str, refused: Callable[..., None]) -> None:
    refused(sweep.main, Options, arguments.split(), sentence)
