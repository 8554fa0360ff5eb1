"""What each reward family adds to the score, on plans that its weight was not chosen on."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from experiments.agreement import LEVEL, Interval, kendall_gain, pair_signs

FACTORS = (0.0, 1 / 3, 1.0, 3.0)
"""Multiples of a family's weight that are tried on a half of the plans."""
SPLITS = 400
"""Random halves."""
FEWEST = 8
"""Plans below which a half says nothing."""

Values = NDArray[np.float64]


class Addition(NamedTuple):
    """What one family adds.

    Attributes:
        kid, l1: tau of the total minus tau of the total without the family, against the finetuned KID and
            L1; bootstrap intervals over plans.
        held_out: tau against KID on one half of the plans, of the weights that are best on the other, minus
            the same where the family was not there to choose; mean, 5 and 95 % of the splits.
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
    the highest tau is judged on the other half. What a family adds there is no merit of having been chosen on
    the plans that judge it.

    Args:
        parts: family → (k,) its weighted score of each plan; the sum is the total. Two families or more.
        kid, l1: (k,) finetuned results, lower is better; k ≥ ``FEWEST``.
        seed: of the halves and the resamples.
    """
    names, table = list(parts), np.stack(list(parts.values()))  # (families, k)
    grid = np.array([row for row in itertools.product(FACTORS, repeat=len(names)) if any(row)])
    signs, better = pair_signs(grid @ table), pair_signs(-kid)  # (products, k, k), (k, k)
    given = int(np.flatnonzero((grid == 1.0).all(1))[0])
    without = {name: np.flatnonzero(grid[:, place] == 0.0) for place, name in enumerate(names)}
    random, count = np.random.default_rng(seed), len(kid)
    on_other: list[tuple[float, float]] = []
    gains: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(SPLITS):
        order = random.permutation(count)
        half, other = (
            _taus(signs[:, rows[:, None], rows], better[rows[:, None], rows])
            for rows in (order[: count // 2], order[count // 2 :])
        )
        best = int(half.argmax())
        on_other.append((other[given], other[best]))
        for name, places in without.items():
            gains[name].append(other[best] - other[places[half[places].argmax()]])
    pairs = np.array(on_other)
    total = table.sum(0)

    def gain(name: str, metric: Values) -> Interval:
        return kendall_gain(total, total - parts[name], -metric, seed=seed)

    return Halves(
        float(pairs[:, 0].mean()),
        _spread(pairs[:, 1] - pairs[:, 0]),
        {name: Addition(gain(name, kid), gain(name, l1), _spread(gains[name])) for name in names},
    )


def _taus(signs: Values, better: Values) -> Values:
    """(n, h, h) and (h, h) signs of differences → (n,) Kendall's tau-b; 0 where all are tied."""
    pairs = np.abs(signs).sum((1, 2)) * np.abs(better).sum()
    agreed = (signs * better).sum((1, 2))
    return np.divide(agreed, np.sqrt(pairs), out=np.zeros(len(signs)), where=pairs > 0)


def _spread(values: Values | list[float]) -> Interval:
    low, high = np.quantile(values, ((1 - LEVEL) / 2, (1 + LEVEL) / 2))
    return Interval(float(np.mean(values)), float(low), float(high))
