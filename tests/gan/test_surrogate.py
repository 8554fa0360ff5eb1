from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from gan.errors import UserError
from gan.plans import Plan
from gan.surrogate import CAUTION, Example, Scope, Searched, Surrogate, cautious, load_surrogate

CHANNELS = {"generator": (32, 64, 32), "discriminator": (16, 16)}
SCOPE = Scope("0123", "kid", "2")
TERMS = ("crowd_gap", "l1_gap")


def plan_of(*widths: int) -> Plan:
    return Plan.of({"generator": widths, "discriminator": (8, 8)}, "l1")


def truth(plan: Plan, gaps: dict[str, float]) -> float:
    """Twice the dense metric of 0.3 at a quarter of the first group's channels; the second is no matter."""
    return 0.3 * (plan["generator"][0] / 32) ** -0.5 * (1 + gaps["l1_gap"])


def examples(count: int, seed: int = 0) -> list[Example]:
    rng = np.random.default_rng(seed)
    rows = []
    for _ in range(count):
        plan = plan_of(*(int(w) for w in rng.integers(4, 33, 3)))
        gaps = {"crowd_gap": float(rng.uniform(0.01, 0.2)), "l1_gap": float(rng.uniform(0.1, 0.3))}
        rows.append(Example(plan, gaps, truth(plan, gaps)))
    return rows


@pytest.fixture(scope="module")
def surrogate() -> Surrogate:
    return Surrogate(examples(30), 0.3, CHANNELS, TERMS, SCOPE)


def test_it_learns_what_the_examples_follow(surrogate):
    unseen = examples(40, seed=1)
    wanted = np.log([example.metric / 0.3 for example in unseen])
    found = np.array([surrogate.predict(example.plan, example.gaps)[0] for example in unseen])
    assert np.abs(found - wanted).max() < 0.1
    assert np.corrcoef(found, wanted)[0, 1] > 0.99


def test_widths_of_the_discriminator_play_no_part(surrogate):
    gaps = {"crowd_gap": 0.1, "l1_gap": 0.2}
    widths = {"generator": (16, 16, 16)}
    few, many = (Plan.of({**widths, "discriminator": (n, n)}, "l1") for n in (2, 16))
    assert surrogate.predict(few, gaps) == surrogate.predict(many, gaps)


def test_it_is_less_sure_far_from_its_examples(surrogate):
    gaps = {"crowd_gap": 0.1, "l1_gap": 0.2}
    near, far = (surrogate.predict(plan, gaps)[1] for plan in (plan_of(16, 16, 16), plan_of(1, 64, 1)))
    assert 0 < near < far


def test_the_gap_is_cautious_and_says_when_a_plan_ends_better_than_the_dense_pair(surrogate):
    example = surrogate.examples[0]
    mean, deviation = surrogate.predict(example.plan, example.gaps)
    assert surrogate.gap(example.plan, example.gaps) == pytest.approx(mean + CAUTION * deviation)
    assert cautious(-3.0, 0.1) == pytest.approx(-3.0 + CAUTION * 0.1)


def test_leaving_one_out_is_a_prediction_without_that_example(surrogate):
    found = surrogate.leave_one_out()[4]
    rest = [example for place, example in enumerate(surrogate.examples) if place != 4]
    without = Surrogate(rest, 0.3, CHANNELS, TERMS, SCOPE)
    left = surrogate.examples[4]
    # the units of the inputs differ by one example's share
    assert found == pytest.approx(without.predict(left.plan, left.gaps), abs=0.02)
    assert found != surrogate.predict(left.plan, left.gaps)
    assert surrogate.leave_one_out()[4] == found  # nothing was left changed


def test_it_comes_back_from_its_file_with_the_same_predictions(surrogate, tmp_path: Path):
    read = load_surrogate(surrogate.save(tmp_path / "surrogate.json"))
    assert read.scope == SCOPE
    assert read.fingerprint == surrogate.fingerprint
    for example in examples(5, seed=2):
        assert read.predict(example.plan, example.gaps) == pytest.approx(
            surrogate.predict(example.plan, example.gaps), rel=1e-9
        )


def test_its_fingerprint_sees_the_examples(surrogate):
    first = surrogate.examples[0]
    other = Surrogate(
        [replace(first, metric=first.metric * 1.1), *surrogate.examples[1:]],
        0.3,
        CHANNELS,
        TERMS,
        SCOPE,
        theta=surrogate.theta,
    )
    assert other.fingerprint != surrogate.fingerprint


def test_the_reach_is_that_of_the_examples(surrogate):
    """The first widths of the examples are 4 to 32 of 32, and nothing else costs anything here."""
    firsts = [example.plan["generator"][0] / 32 for example in surrogate.examples]
    assert surrogate.reach({"generator": FirstWidth()}, "macs") == {"generator": (min(firsts), max(firsts))}


class FirstWidth:
    """A cost model for which only the first group costs anything."""

    dense = np.array([32, 64, 32])

    def of(self, kind, widths):
        return np.asarray(widths, dtype=np.float64)[..., 0]


@pytest.mark.parametrize(
    ("cost", "generator", "covered"),
    [
        ("params", (0.1, 0.1), True),
        ("params", (0.095, 0.105), True),
        ("params", (0.1, 0.2), False),
        ("params", (0.05, 0.05), False),
        ("macs", (0.1, 0.1), False),
    ],
)
def test_only_budgets_that_were_searched_are_covered(surrogate, tmp_path, cost, generator, covered):
    searched = [Searched("params", {"generator": 0.1, "discriminator": 0.5})]
    led = Surrogate(surrogate.examples, 0.3, CHANNELS, TERMS, SCOPE, searched=searched, theta=surrogate.theta)
    assert load_surrogate(led.save(tmp_path / "s.json")).searched == tuple(searched)
    budgets = {"generator": generator, "discriminator": (0.5, 0.5)}
    assert led.covers(cost, budgets) is covered
    assert not led.covers(cost, {"generator": generator})
    assert not surrogate.covers(cost, budgets)


def test_too_few_examples_and_useless_metrics_are_refused():
    with pytest.raises(UserError, match="8 finetuned plans or more; got 5"):
        Surrogate(examples(5), 0.3, CHANNELS, TERMS, SCOPE)
    for bad in (0.0, -0.1, math.nan):
        rows = examples(9)
        with pytest.raises(UserError, match="above 0"):
            Surrogate([replace(rows[0], metric=bad), *rows[1:]], 0.3, CHANNELS, TERMS, SCOPE)


@pytest.mark.parametrize("damage", ["{", "[]", '{"format": 1}', '{"format": 99}'])
def test_damaged_files_are_refused_in_a_sentence(damage, tmp_path: Path):
    path = tmp_path / "surrogate.json"
    with pytest.raises(UserError, match="there is no surrogate"):
        load_surrogate(path)
    path.write_text(damage)
    with pytest.raises(UserError, match="damaged"):
        load_surrogate(path)


def test_a_missing_gap_in_the_file_is_damage(surrogate, tmp_path: Path):
    content = surrogate.to_dict()
    del content["examples"][3]["gaps"]["l1_gap"]
    (tmp_path / "s.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match="damaged"):
        load_surrogate(tmp_path / "s.json")
