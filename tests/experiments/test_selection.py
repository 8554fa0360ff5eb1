from __future__ import annotations

import math

import pytest
from torch import nn

from experiments import train_agents
from experiments.selection import Verdict
from gan.tasks import load_task


@pytest.mark.parametrize(
    ("before", "after", "kept"),
    [(0.4, 0.3, "after"), (0.3, 0.4, "before"), (0.3, 0.3, "after"), (0.3, math.nan, "before")],
)
def test_the_worse_one_is_not_kept(before: float, after: float, kept: str) -> None:
    verdict = Verdict(before, after)
    assert verdict.kept == kept
    assert ("the start is kept" in verdict.sentence) == (kept == "before")


def test_a_finetuning_that_made_it_worse_is_undone(monkeypatch: pytest.MonkeyPatch) -> None:
    """The start of the longer finetuning is the uniform slice, too."""
    task = load_task("edges2emoji")
    dense = task.networks["generator"], task.networks["discriminator"]
    raw, spoilt = (nn.Identity(), nn.Identity()), (nn.Identity(), nn.Identity())
    better, worse, longer = ((nn.Identity(), nn.Identity()) for _ in range(3))
    pairs = {"dense": dense, "uniform_raw": raw, "pruned_raw": spoilt}
    pairs |= {"uniform": worse, "pruned": better, "uniform_equal_time": longer}
    figures = {
        id(dense): 0.1,
        id(raw): 0.3,
        id(spoilt): 0.9,
        id(worse): 0.5,
        id(better): 0.2,
        id(longer): 0.4,
    }
    kids = {id(pairs[name][0]): figures[id(pairs[name])] for name in pairs}
    monkeypatch.setattr(
        train_agents, "measure", lambda _judge, generator: {train_agents.KID: kids[id(generator)]}
    )
    verdicts = train_agents.keep_better(task, pairs, task.val.take(8))
    assert {name: verdict.kept for name, verdict in verdicts.items()} == {
        "uniform": "before",
        "pruned": "after",
        "uniform_equal_time": "before",
    }
    assert pairs["uniform"] is raw
    assert pairs["uniform_equal_time"] is raw
    assert pairs["pruned"] is better
    assert pairs["dense"] is dense
