"""What each reward family adds to the score, where its weight was not chosen."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from experiments.agreement import LEVEL, NOTHING, Interval, Values, interval_ends, kendall_gain, weighted_taus

FACTORS = (0.0, 1 / 3, 1.0, 3.0)
"""Multiples of a family's weight that are tried on a half of the plans."""
SPLITS = 400
"""Random halves."""
FEWEST_TO_HALVE = 8
"""Plans below which a half says nothing."""
DIGITS = 9
"""Of scores that are compared: sums of the same parts in another order are the same score."""


class Addition(NamedTuple):
    """What one family adds.

    Attributes:
        kid, l1: tau of the total minus tau of the total without the family, against the finetuned KID and
            L1; bootstrap intervals over plans.
        held_out: tau against KID on one half of the plans, of the weights that are best on the other, minus
            the same where the family was not there to choose; mean, and 5 and 95 % of the splits, which
            overlap: no interval of confidence.
    """

    kid: Interval
    l1: Interval
    held_out: Interval


class Halves(NamedTuple):
    """What choosing weights on a half of the plans is worth on the other half.

    Attributes:
        given: mean tau against KID of the given weights on the other halves.
        chosen: tau of the chosen ones minus that; mean, 5 and 95 % of the splits.
        additions: family → what it adds.
    """

    given: float
    chosen: Interval
    additions: dict[str, Addition]


def weigh(parts: Mapping[str, Values], kid: Values, l1: Values, seed: int = 0) -> Halves:
    """Weight-0 ablations with intervals, and with weights that were chosen elsewhere.

    On random halves of the plans every family's weight is multiplied by each of ``FACTORS``; the product with
    the highest tau is judged on the other half, the mean of those that share it. So no family gains from its
    weight having been chosen on the plans that judge it. What its scores themselves were fitted to is another
    matter: a predicted recovery may have seen the other plans' ends.

    Args:
        parts: family → (k,) its weighted score of each plan; the sum is the total. Two families or more.
        kid, l1: (k,) finetuned results, lower is better; k ≥ ``FEWEST_TO_HALVE``.
        seed: of the halves and the resamples.
    """
    names, table = list(parts), np.stack(list(parts.values()))  # (families, k)
    grid = _products(len(names))
    total = table.sum(0)
    without = {name: np.flatnonzero(grid[:, place] == 0.0) for place, name in enumerate(names)}
    random, count = np.random.default_rng(seed), len(kid)
    halves = np.zeros((SPLITS, count))
    for row in halves:
        row[random.permutation(count)[: count // 2]] = 1.0
    scores = np.round(np.vstack([grid @ table, total]), DIGITS)
    here, there = (np.nan_to_num(weighted_taus(scores, kid, rows)) for rows in (halves, 1.0 - halves))
    given, products = there[:, -1], np.arange(len(grid))

    def judged(places: NDArray[np.int64]) -> Values:
        """(splits,) mean tau on the other half of those products that are best on this one."""
        best = np.isclose(here[:, places], here[:, places].max(1, keepdims=True))
        return np.average(there[:, places], axis=1, weights=best)

    chosen = judged(products)

    def spread(values: Values) -> Interval:
        if np.ptp(kid) == 0:  # no plan is better than another
            return NOTHING
        return Interval(float(np.mean(values)), *interval_ends(values, LEVEL))

    def gain(name: str, metric: Values) -> Interval:
        rest = sum(part for other, part in parts.items() if other != name)
        return kendall_gain(np.round(total, DIGITS), np.round(rest, DIGITS), -metric, seed=seed)

    return Halves(
        float(np.mean(given)),
        spread(chosen - given),
        {
            name: Addition(gain(name, kid), gain(name, l1), spread(chosen - judged(places)))
            for name, places in without.items()
        },
    )


def _products(families: int) -> Values:
    """(products, families) of ``FACTORS``, those once that order plans alike: multiples of one another."""
    rows = [row for row in itertools.product(FACTORS, repeat=families) if any(row)]
    return np.array(list({tuple(np.round(np.array(row) / max(row), 6)): row for row in rows}.values()))
