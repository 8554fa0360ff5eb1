from __future__ import annotations

import math

import pytest
from torch import nn

from experiments import road
from experiments.selection import Verdict
from gan.tasks import load_task


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
