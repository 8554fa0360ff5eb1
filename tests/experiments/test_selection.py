from __future__ import annotations

import io
import json
import math
from dataclasses import replace

import pytest
from rich.console import Console
from torch import nn

from experiments import road
from experiments.selection import Verdict
from experiments.train_agents import Options
from experiments.watch import Watch
from gan.tasks import Task, load_task
from tests.gan.conftest import Pair, _pair, pair, task

__all__ = ["Pair", "_pair", "pair", "task"]  # fixtures


@pytest.mark.parametrize(
    ("before", "after", "kept"),
    [
        (0.4, 0.3, "after"),
        (0.3, 0.4, "before"),
        (0.3, 0.3, "after"),
        (0.3, math.nan, "before"),
        (math.nan, 0.3, "after"),
    ],
)
def test_the_worse_one_is_not_kept(before: float, after: float, kept: str) -> None:
    verdict = Verdict(before, after)
    assert verdict.kept == kept
    assert ("the start is kept" in verdict.sentence) == (kept == "before")
    assert ("diverged" in verdict.sentence) == math.isnan(after)
    json.dumps(verdict.to_dict(), allow_nan=False)


def test_a_finetuning_that_made_it_worse_is_undone(monkeypatch: pytest.MonkeyPatch) -> None:
    """The start of the longer finetuning is the uniform slice, too."""
    task = load_task("edges2emoji")
    dense = task.networks["generator"], task.networks["discriminator"]
    figures = {
        "uniform_raw": 0.3,
        "pruned_raw": 0.9,
        "uniform": 0.5,
        "pruned": 0.2,
        "uniform_equal_time": 0.4,
    }
    pairs = {name: (nn.Identity(), nn.Identity()) for name in figures} | {"dense": dense}
    kids = {id(pairs[name][0]): kid for name, kid in {**figures, "dense": 0.1}.items()}
    monkeypatch.setattr(road, "validate", lambda _judge, generator: {road.KID: kids[id(generator)]})
    stages: dict[str, road.Pairs] = {name: {"": pair} for name, pair in pairs.items()}
    before = dict(stages)
    verdicts = road.keep_better(task, stages, 8)
    assert {name: verdict.kept for name, verdict in verdicts.items()} == {
        "uniform": "before",
        "pruned": "after",
        "uniform_equal_time": "before",
    }
    kept = {name: next(key for key in pairs if stages[name][""] is pairs[key]) for name in stages}
    assert kept == {
        **{name: name for name in ("dense", "uniform_raw", "pruned_raw", "pruned")},
        "uniform": "uniform_raw",
        "uniform_equal_time": "uniform_raw",
    }
    verdicts = road.keep_better(task, before, 8, diverged=["pruned"])
    assert math.isnan(verdicts["pruned"].after)
    assert verdicts["pruned"].kept == "before"
    assert before["pruned"][""] is pairs["pruned_raw"]


def test_a_finetuning_that_diverges_gives_its_start_back(task: Task) -> None:
    told = io.StringIO()
    options = Options(quick=True)
    finetune = road.Finetuning(task, options, road.Sizes.of(options), Watch(Console(file=told, width=200)))
    start = {"": (task.networks["generator"], task.networks["discriminator"])}
    assert finetune("uniform", start) is not start
    finetune.training = replace(finetune.training, learning_rate=1e30)
    assert finetune("pruned", start) is start
    assert finetune.diverged == ["pruned"]
    assert "finetuning of pruned diverged, its start is kept: the " in told.getvalue()
    assert "finetune pruned" in finetune.watch.seconds
