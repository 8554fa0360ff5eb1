"""From gaps to rewards: every term in one unit, every weight in one place. Pure functions."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from gan.errors import UserError, unknown
from gan.evaluations import FAMILIES

SHARES: dict[str, float] = {
    "crowd_gap": 1.0,
    "arrangement_gap": 0.0,
    "mmd_gap": 1.0,
    "real_gap": 0.0,
    "l1_gap": 0.0,
    "feature_gap": 0.0,
    "recovery_gap": 1.0,
    "balance_gap": 1.0,
}
"""Reward term → its share of its family's weight; terms at 0 are logged only."""

SCORE_BOUNDS = (-5.0, 10.0)
"""Term scores are clipped to these: one collapsed plan must not outweigh a hundred others, and no search may
run blind at the top, where good plans are 5 typical differences better than the uniform one."""

RELATIVE_FLOOR = 0.01
"""A spread is at least this share of the uniform plan's gap: random plans that agree say nothing finer."""

ABSOLUTE_FLOOR = 1e-6
"""A spread is at least this: a gap that is 0 for every random plan has no unit of its own."""


@dataclass(frozen=True)
class Weights:
    """Weight of each family of reward terms; the terms of a family share it by ``SHARES``.

    Attributes:
        density: local density of the generator's outputs.
        fidelity: closeness of the outputs to the dense ones.
        balance: how evenly matched the pair stays.
        recovery: what finetuning will make of the plan, as far as plans that were finetuned tell; 0 for
            every plan where there are none.

    Raises:
        UserError: if a weight is negative or not finite, or none is above 0.
    """

    density: float = 1.0
    fidelity: float = 1.0
    balance: float = 0.1
    recovery: float = 4.0

    def __post_init__(self) -> None:
        values = (self.density, self.fidelity, self.balance, self.recovery)
        if not all(math.isfinite(value) and value >= 0 for value in values) or not any(values):
            raise UserError(f"reward weights must be at least 0, and one above 0; got {self}")

    def of(self, term: str) -> float:
        """Weight of one term: its family's weight × its share."""
        if term not in FAMILIES:
            raise unknown("reward term", term, FAMILIES)
        return float(getattr(self, FAMILIES[term])) * SHARES[term]

    @property
    def total(self) -> float:
        """Sum of all weights: potential / total is the weighted mean of the term scores."""
        return self.density + self.fidelity + self.balance + self.recovery


def robust_spread(gaps: ArrayLike, uniform_gap: float) -> float:
    """Typical difference between random plans: the interquartile range / 1.349, floored.

    For a normal distribution that is its standard deviation (Huber & Ronchetti, Robust Statistics, 2009,
    §5.1); a few collapsed plans do not move it.

    Args:
        gaps: (k,) gaps of random plans at one budget.
        uniform_gap: gap of the uniform plan at that budget.
    """
    low, high = np.percentile(np.asarray(gaps, dtype=np.float64), (25, 75))
    return max(float(high - low) / 1.349, RELATIVE_FLOOR * uniform_gap, ABSOLUTE_FLOOR)


def term_scores(
    gaps: Mapping[str, float],
    uniform_gaps: Mapping[str, float],
    spreads: Mapping[str, float],
    bounds: tuple[float, float] = SCORE_BOUNDS,
) -> dict[str, float]:
    """Score of each term, (uniform gap - gap) / spread, clipped: 0 = uniform, higher = better."""
    low, high = bounds
    return {
        term: min(high, max(low, (uniform_gaps[term] - gap) / spreads[term]))
        + 0.0  # + 0.0 turns -0.0 into 0.0
        for term, gap in gaps.items()
    }


def term_rewards(scores: Mapping[str, float], weights: Weights) -> dict[str, float]:
    """Weighted score of each term; their sum is the potential."""
    return {term: weights.of(term) * score + 0.0 for term, score in scores.items()}


def potential(scores: Mapping[str, float], weights: Weights) -> float:
    """Weighted sum of the term scores: what a plan is worth, 0 for the uniform plan."""
    return math.fsum(term_rewards(scores, weights).values())
