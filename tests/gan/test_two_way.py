from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch

import gan.tasks
from gan.checkpoints import state_hash
from gan.cyclegan import CYCLE_FINETUNING, Direction
from gan.errors import UserError
from gan.loop import TrainingProgress
from gan.plans import Plan
from gan.tasks import Task
from gan.two_way import FOUR_AGENTS, TwoWayTask, cut, joined, load_two_way, part_of
from tests.gan.conftest import fake_extractor
from tests.gan.test_unpaired import DENSE, SMALL, make_task


def make_both() -> TwoWayTask:
    first = make_task()
    second = replace(
        make_task(4),
        train=first.train.swapped(),
        val=first.val.swapped(),
        back=first.networks["generator"],
    )
    return TwoWayTask("tiny", {"A": replace(first, back=second.networks["generator"]), "B": second})


@pytest.fixture(scope="session")
def _both() -> TwoWayTask:
    return make_both()


@pytest.fixture
def both(_both: TwoWayTask, monkeypatch: pytest.MonkeyPatch) -> TwoWayTask:
    monkeypatch.setattr(gan.tasks, "load_extractor", lambda device: fake_extractor())
    monkeypatch.setattr(gan.tasks, "bfloat16_pays", lambda device: False)
    return copy.deepcopy(_both)


def test_plans_are_joined_and_parted() -> None:
    plans: dict[Direction, Plan] = {"A": DENSE, "B": SMALL}
    whole = joined(plans)
    assert whole.agents == FOUR_AGENTS == ("generator_A", "generator_B", "discriminator_A", "discriminator_B")
    assert whole["generator_B"] == SMALL["generator"]
    assert {way: part_of(whole, way) for way in plans} == plans
    with pytest.raises(ValueError, match="one ranking"):
        joined({"A": DENSE, "B": Plan(SMALL.entries, "other")})


def test_gaps_are_means_over_both_directions(both: TwoWayTask) -> None:
    scorer = both.scorer("macs", "dense", statistics_images=12)
    assert tuple(scorer.networks) == FOUR_AGENTS
    assert scorer.networks["discriminator_B"].kind == "discriminator"
    plan = joined({"A": DENSE, "B": SMALL})
    found = scorer.score(plan)
    alone = {way: scorer.ways[way].score(part_of(plan, way)).gaps for way in ("A", "B")}
    for name, gap in found.gaps.items():
        assert gap == pytest.approx((alone["A"][name] + alone["B"][name]) / 2)
        assert found.diagnostics[f"{name} B"] == alone["B"][name]
    assert alone["A"]["mmd_gap"] == pytest.approx(0, abs=1e-4)
    assert alone["B"]["mmd_gap"] > 0.01
    assert scorer.fingerprint["weights A"] != scorer.fingerprint["weights B"]


def test_both_directions_are_cut_and_finetuned_together(both: TwoWayTask) -> None:
    raw = cut(both, both.ordered(), joined({"A": SMALL, "B": SMALL}))
    before = [state_hash(network) for pair in raw.values() for network in pair]
    dense = [state_hash(network) for network in both.networks.values()]
    told: list[TrainingProgress] = []
    tuned = both.finetune(raw, replace(CYCLE_FINETUNING, epochs=6, learning_rate=5e-3, shift=1), told.append)
    assert [state_hash(network) for pair in raw.values() for network in pair] == before
    assert [state_hash(network) for network in both.networks.values()] == dense
    for way, task in both.ways.items():
        name = f"distillation {way}"
        assert told[-1].losses[name] < told[0].losses[name]
        shapes = [[p.shape for p in pair[0].parameters()] for pair in (raw[way], tuned[way])]
        assert shapes[0] == shapes[1]
        assert not torch.equal(next(raw[way][1].parameters()), next(tuned[way][1].parameters()))
        assert isinstance(task, Task)


def test_an_unknown_name_is_a_sentence() -> None:
    with pytest.raises(UserError, match="unknown task of two directions 'noto'; known are noto_and_twemoji"):
        load_two_way("noto")
