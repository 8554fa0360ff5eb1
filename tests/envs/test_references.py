from __future__ import annotations

import numpy as np
import pytest

from envs.budget import Budget
from envs.references import References
from envs.toy import toy_scorer
from gan.evaluations import CountedScorer

FIXED = {"generator": Budget(0.1, 0.1), "discriminator": Budget(0.5, 0.5)}
RANGES = {"generator": Budget(0.1, 0.4), "discriminator": Budget(0.5, 0.5)}


def references(budgets: dict[str, Budget]) -> References:
    return References(CountedScorer(toy_scorer()), budgets)


def test_references_are_not_counted_and_scored_once() -> None:
    reference = references(FIXED)
    seen: list[tuple[int, int]] = []
    reference.prepare(lambda done, total: seen.append((done, total)))
    reference.prepare(lambda done, total: seen.append((done, total)))
    assert seen == [(i, 64) for i in range(1, 65)]
    assert (reference.scorer.evaluations, reference.scorer.requests) == (0, 0)


def test_spread_is_that_of_the_random_plans() -> None:
    reference = references(FIXED)
    seen = []
    score = reference.scorer.scorer.score
    reference.scorer.scorer.score = lambda plan: seen.append(score(plan)) or seen[-1]  # type: ignore[method-assign]
    spreads = reference.at({"generator": 0.1, "discriminator": 0.5}).spreads
    gaps = [scores.gaps["mmd_gap"] for scores in seen[:64]]
    low, high = np.percentile(gaps, (25, 75))
    assert spreads["mmd_gap"] == pytest.approx((high - low) / 1.349)


def test_references_are_reproducible() -> None:
    budgets = {"generator": 0.1, "discriminator": 0.5}
    assert references(FIXED).at(budgets) == references(FIXED).at(budgets)


def test_ranges_are_bilinear_in_log_budget() -> None:
    reference = references(RANGES)
    seen: list[tuple[int, int]] = []
    reference.prepare(lambda done, total: seen.append((done, total)))
    assert seen[-1] == (192, 192)  # only the generator has a range: 3 x 1

    def spread(budget: float) -> float:
        return reference.at({"generator": budget, "discriminator": 0.5}).spreads["mmd_gap"]

    for budget in (0.1, 0.2, 0.4):  # ends and log-middle are measured
        fixed = references({**FIXED, "generator": Budget(budget, budget)})
        here = fixed.at({"generator": budget, "discriminator": 0.5})
        assert spread(budget) == pytest.approx(here.spreads["mmd_gap"])
    between = 0.2 * 2**0.25
    assert spread(between) == pytest.approx(0.75 * spread(0.2) + 0.25 * spread(0.4))


def test_uniform_gaps_are_those_of_the_exact_budget() -> None:
    reference = references(RANGES)
    budgets = {"generator": 0.17, "discriminator": 0.5}
    scores = reference.scorer.scorer.score(reference.uniform_plan(budgets))
    assert reference.at(budgets).uniform_gaps == scores.gaps
