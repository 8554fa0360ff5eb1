from __future__ import annotations

import math

import numpy as np
import pytest

from envs.rewards import SHARES, Weights, potential, robust_spread, term_rewards, term_scores
from gan.errors import UserError
from gan.evaluations import FAMILIES


def test_scores_by_hand() -> None:
    scores = term_scores(
        {"mmd_gap": 0.1, "l1_gap": 0.3, "balance_gap": 9.0, "crowd_gap": 0.0, "real_gap": 0.0},
        {"mmd_gap": 0.3, "l1_gap": 0.2, "balance_gap": 1.0, "crowd_gap": 8.0, "real_gap": 12.0},
        {"mmd_gap": 0.1, "l1_gap": 0.4, "balance_gap": 1.0, "crowd_gap": 1.0, "real_gap": 1.0},
    )
    expected = {"mmd_gap": 2.0, "l1_gap": -0.25, "balance_gap": -5.0, "crowd_gap": 8.0, "real_gap": 10.0}
    assert scores == pytest.approx(expected)


def test_potential_by_hand() -> None:
    scores = {"mmd_gap": 2.0, "l1_gap": -1.0, "real_gap": 3.0, "crowd_gap": 4.0, "balance_gap": -5.0}
    scores["recovery_gap"] = 0.5
    weights = Weights(density=0.2, fidelity=1.0, balance=0.1, recovery=2.0)
    rewards = {"mmd_gap": 2.0, "l1_gap": 0.0, "real_gap": 0.0, "crowd_gap": 0.8, "balance_gap": -0.5}
    rewards["recovery_gap"] = 1.0
    assert term_rewards(scores, weights) == pytest.approx(rewards)
    assert potential(scores, weights) == pytest.approx(3.3)
    assert potential({}, weights) == 0.0


def test_uniform_scores_exactly_zero() -> None:
    gaps = dict.fromkeys(FAMILIES, 0.1 + 0.2)
    scores = term_scores(gaps, gaps, dict.fromkeys(FAMILIES, 0.3))
    assert all(score == 0.0 and math.copysign(1.0, score) == 1.0 for score in scores.values())
    assert potential(scores, Weights()) == 0.0


def test_worse_images_lower_the_potential() -> None:
    uniform, spreads = dict.fromkeys(FAMILIES, 1.0), dict.fromkeys(FAMILIES, 0.5)
    worths = [
        potential(term_scores(dict.fromkeys(FAMILIES, gap), uniform, spreads), Weights())
        for gap in (0.0, 0.5, 1.0, 1.5)
    ]
    assert worths == sorted(worths, reverse=True)
    assert len(set(worths)) == 4


def test_every_term_has_a_share_and_families_share_one() -> None:
    assert set(SHARES) == set(FAMILIES)
    for family in set(FAMILIES.values()):
        assert sum(SHARES[term] for term in FAMILIES if FAMILIES[term] == family) == pytest.approx(1.0)


def test_spread_is_that_of_a_normal_distribution_and_ignores_outliers() -> None:
    gaps = np.random.default_rng(0).normal(10.0, 2.0, size=4000)
    assert robust_spread(gaps, 1.0) == pytest.approx(2.0, rel=0.05)
    gaps[:200] = 1e6
    assert robust_spread(gaps, 1.0) == pytest.approx(2.0, rel=0.15)


def test_spread_by_hand_and_floors() -> None:
    assert robust_spread([1, 2, 3, 4, 5], 0.0) == pytest.approx(2 / 1.349)
    assert robust_spread([3, 3, 3], 5.0) == pytest.approx(0.05)
    assert robust_spread([0, 0, 0], 0.0) == 1e-6


@pytest.mark.parametrize("values", [(-0.1, 1, 1, 1), (math.nan, 1, 1, 1), (1, 1, 1, math.inf), (0, 0, 0, 0)])
def test_weights_are_checked(values: tuple[float, float, float, float]) -> None:
    with pytest.raises(UserError, match="at least 0"):
        Weights(*values)


def test_unknown_term_is_refused() -> None:
    with pytest.raises(UserError, match="did you mean 'mmd_gap'"):
        Weights().of("mdm_gap")
