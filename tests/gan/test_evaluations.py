from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest

from gan.append_log import LogMismatch
from gan.evaluations import FAMILIES, CountedScorer, EvaluationLog, PrunableNetwork, Scores
from gan.plans import Plan
from tests.gan.conftest import Pair

FINGERPRINT = {"weights": "w1", "probe": "p1"}


def plan(width: int) -> Plan:
    return Plan.of({"generator": (width, 4), "discriminator": (2,)}, "l1")


class FakeScorer:
    """The gap is the first width; remembers what it was asked."""

    networks: dict[str, PrunableNetwork]
    ranking = "l1"
    fingerprint = FINGERPRINT

    def __init__(self, gap: float | None = None) -> None:
        self.networks = {}
        self.calls: list[int] = []
        self.gap = gap

    def score(self, plan: Plan) -> Scores:
        width = plan["generator"][0]
        self.calls.append(width)
        return Scores({"l1_gap": width / 8 if self.gap is None else self.gap}, {"arrangement_mean": -1.5})


def log_at(path: Path) -> EvaluationLog:
    return EvaluationLog(path, FINGERPRINT)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "evaluations.jsonl"


def play(path: Path, *widths: int, limit: int | None = None) -> tuple[CountedScorer, FakeScorer]:
    """A run that requests these plans; negative widths are uncounted references."""
    scorer = FakeScorer()
    counted = CountedScorer(scorer, log_at(path), limit)
    for width in widths:
        counted.score(plan(abs(width)), counted=width > 0)
    return counted, scorer


def test_every_family_is_one_of_the_four():
    assert set(FAMILIES.values()) == {"density", "fidelity", "balance", "recovery"}
    assert all(term.endswith("_gap") for term in FAMILIES)


def test_a_plan_is_scored_once():
    scorer = FakeScorer()
    counted = CountedScorer(scorer)
    first = counted.score(plan(3))
    assert counted.score(plan(3)) is first
    assert first.gaps == {"l1_gap": 3 / 8}
    assert scorer.calls == [3]
    assert (counted.evaluations, counted.requests, counted.computed) == (1, 2, 1)


def test_references_are_free():
    counted = CountedScorer(FakeScorer(), limit=2)
    for _ in range(20):
        counted.score(plan(1), counted=False)
    assert (counted.evaluations, counted.requests, counted.computed) == (0, 0, 1)
    assert not counted.exhausted
    counted.score(plan(1))  # now the search itself asks
    assert (counted.evaluations, counted.requests, counted.computed) == (1, 1, 1)


def test_a_search_ends_after_its_evaluations():
    counted = CountedScorer(FakeScorer(), limit=3)
    for width in (1, 2, 2, 3):
        assert not counted.exhausted
        counted.score(plan(width))
    assert counted.exhausted
    assert counted.evaluations == 3
    counted.score(plan(4))  # what is under way may end
    assert counted.evaluations == 4


def test_a_search_that_repeats_itself_ends_too():
    counted = CountedScorer(FakeScorer(), limit=3)
    for _ in range(12):
        assert not counted.exhausted
        counted.score(plan(1))
    assert counted.exhausted
    assert (counted.evaluations, counted.requests) == (1, 12)


def test_work_that_is_no_score_is_counted_and_the_log_is_followed_all_the_same(path):
    first = CountedScorer(FakeScorer(), log_at(path), limit=5)
    for width in (3, 4):
        first.score(plan(width))
    second = CountedScorer(FakeScorer(), log_at(path), limit=5)
    second.score(plan(3))
    second.spend(3)
    assert second.evaluations == 4
    assert not second.exhausted
    second.score(plan(4))
    assert second.exhausted
    assert (second.requests, second.replay_left) == (2, None)


def test_without_a_limit_nothing_is_exhausted():
    counted = CountedScorer(FakeScorer())
    for width in range(1, 9):
        counted.score(plan(width))
    assert not counted.exhausted


@pytest.mark.parametrize("gap", [-1e-9, math.nan, math.inf])
def test_a_wrong_gap_is_refused_and_not_logged(path, gap):
    counted = CountedScorer(FakeScorer(gap), log_at(path))
    with pytest.raises(ValueError, match=r"l1_gap of plan .* a gap must be finite and at least 0"):
        counted.score(plan(1))
    assert len(path.read_text().splitlines()) == 1
    assert log_at(path).scores == {}


def test_predictions_may_be_better_than_the_dense_pair(path):
    class Better(FakeScorer):
        def score(self, plan):
            scores = super().score(plan)
            return Scores({**scores.gaps, "recovery_gap": -0.1}, scores.diagnostics)

    CountedScorer(Better(), log_at(path)).score(plan(1))
    assert log_at(path).scores[plan(1).key].gaps["recovery_gap"] == -0.1


def test_the_file_is_json_lines(path):
    play(path, -5, 3, 3, 4)

    def refuse(constant: str) -> None:
        pytest.fail(f"{constant} is no JSON")

    text = path.read_text()
    assert text.endswith("\n")
    header, *entries = [json.loads(line, parse_constant=refuse) for line in text.splitlines()]
    assert header == {"format": 1, **FINGERPRINT}
    assert [entry["plan"]["widths"]["generator"][0] for entry in entries] == [5, 3, 4]
    assert [entry["counted"] for entry in entries] == [False, True, True]
    assert entries[1]["gaps"] == {"l1_gap": 3 / 8}
    assert entries[1]["diagnostics"] == {"arrangement_mean": -1.5}
    assert all(entry["seconds"] >= 0 for entry in entries)


def test_a_log_gives_back_what_was_written(path):
    play(path, -5, 3, 4)
    log = log_at(path)
    assert log.counted == [plan(3).key, plan(4).key]
    assert log.scores == {
        plan(w).key: Scores({"l1_gap": w / 8}, {"arrangement_mean": -1.5}) for w in (5, 3, 4)
    }


def test_a_repeated_run_reads_its_log_and_counts_as_the_first(path):
    first, _ = play(path, -5, 3, 4, 3, 6, limit=3)
    written = path.read_text()
    second, scorer = play(path, -5, 3, 4, 3, 6, limit=3)
    assert scorer.calls == []
    assert second.computed == 0
    assert (second.evaluations, second.requests) == (first.evaluations, first.requests) == (3, 4)
    assert second.exhausted
    assert second.replay_left is None
    assert path.read_text() == written


def test_a_resumed_run_goes_on_where_the_log_ends(path):
    play(path, -5, 3, 4)
    second, scorer = play(path, -5, 3, 4, 6, 7)
    assert scorer.calls == [6, 7]
    assert second.evaluations == 4
    assert second.replay_left is None
    assert log_at(path).counted == [plan(w).key for w in (3, 4, 6, 7)]


def test_a_run_that_leaves_the_log_says_where(path):
    play(path, 3, 4, 6)
    second, scorer = play(path, 3, 7, 6, 4)
    assert second.replay_left == 1
    assert scorer.calls == [7]  # known plans are known, in whatever order they come


def test_a_reference_that_the_search_asks_for_later_keeps_its_place(path):
    first, _ = play(path, -5, 3, 5, 4)
    assert log_at(path).counted == [plan(w).key for w in (3, 5, 4)]
    second, scorer = play(path, -5, 3, 5, 4, 6)
    assert first.replay_left is None
    assert second.replay_left is None
    assert second.evaluations == first.evaluations + 1
    assert scorer.calls == [6]
    third, _ = play(path, -5, 3, 5, 7)
    assert third.replay_left == 2


@pytest.mark.parametrize("torn", ['{"plan": {"wid', "{", '{"plan": 1}'])
def test_a_torn_last_line_is_dropped_and_cut(path, torn):
    play(path, 3, 4)
    whole = path.read_text()
    path.write_text(whole + torn)
    log = log_at(path)
    assert log.counted == [plan(3).key, plan(4).key]
    play(path, 3, 4, 6)
    assert path.read_text().startswith(whole + '{"plan": {"widths"')
    assert log_at(path).counted == [plan(w).key for w in (3, 4, 6)]


def test_who_only_reads_leaves_a_line_that_another_process_is_writing(path):
    play(path, 3, 4)
    whole = path.read_bytes()
    half = len(whole) - 9
    path.write_bytes(whole[:half])
    assert log_at(path).counted == [plan(3).key]
    with path.open("ab") as file:
        file.write(whole[half:])
    assert log_at(path).counted == [plan(3).key, plan(4).key]


@pytest.mark.parametrize("torn", ["", '{"format": 1, "wei'])
def test_a_torn_header_is_written_again(path, torn):
    path.write_text(torn)
    play(path, 3)
    assert json.loads(path.read_text().splitlines()[0]) == {"format": 1, **FINGERPRINT}
    assert log_at(path).counted == [plan(3).key]


@pytest.mark.parametrize(
    ("other", "what"),
    [
        ({"weights": "w2", "probe": "p1"}, "weights"),
        ({"weights": "w2", "probe": "p2"}, "probe, weights"),
        ({"weights": "w1"}, "probe"),
        ({**FINGERPRINT, "formulas": "2"}, "formulas"),
    ],
)
def test_another_header_is_refused_and_the_file_stays(path, other, what):
    play(path, 3, 4)
    before = path.read_bytes()
    with pytest.raises(LogMismatch, match=f"written with another {what}; .*start a new run"):
        EvaluationLog(path, other)
    assert path.read_bytes() == before


def test_a_file_that_is_no_log_is_refused_and_stays(path):
    path.write_text("notes of mine\n")
    with pytest.raises(LogMismatch, match="is no evaluation log"):
        log_at(path)
    assert path.read_text() == "notes of mine\n"


@pytest.mark.parametrize("damaged", ['{"plan": {"wid', "[]", '{"plan": 1}', "{}"])
def test_a_damaged_line_in_the_middle_is_named_and_the_file_stays(path, damaged):
    play(path, 3, 4)
    lines = path.read_text().splitlines()
    path.write_text("\n".join([lines[0], damaged, lines[2]]) + "\n")
    before = path.read_bytes()
    with pytest.raises(LogMismatch, match=r"line 2 of .* is damaged"):
        log_at(path)
    assert path.read_bytes() == before


def test_a_log_knows_what_scoring_took(path):
    log = log_at(path)
    for width, counted, seconds in ((3, True, 1.5), (4, False, 0.25), (5, True, 2.0)):
        log.append(plan(width), Scores({"l1_gap": 0.1}), counted, seconds)
    assert (log.search_seconds, log.reference_seconds) == (0.0, 0.0)
    again = log_at(path)
    assert (again.search_seconds, again.reference_seconds) == (3.5, 0.25)


def test_the_networks_and_the_ranking_are_those_of_the_scorer():
    scorer = FakeScorer()
    counted = CountedScorer(scorer)
    assert counted.networks is scorer.networks
    assert counted.ranking == "l1"


def test_a_prunable_network_knows_its_widths_and_cost(pair: Pair):
    from gan.cost import build_cost_model

    groups = pair.groups["generator"]
    cost = build_cost_model(pair.generator, groups, [pair.statistics["generator"][:1]])
    network = PrunableNetwork("generator", groups, 10, cost, "params", ())
    assert network.channels.tolist() == [8, 12, 16, 12, 8]
    assert network.minimum.tolist() == [8, 10, 10, 10, 8]  # where the multiple is larger, all channels
    widths = np.array([[8, 12, 16, 12, 8], [8, 10, 10, 10, 8]])
    assert network.cost_of(widths).tolist() == cost.params(widths).tolist()
