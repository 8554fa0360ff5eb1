"""What few runs say of many: interquartile means, stratified bootstrap, probability of improvement.

Agarwal, Schwarzer, Castro, Courville and Bellemare, "Deep Reinforcement Learning at the Edge of the
Statistical Precipice", NeurIPS 2021 (arXiv:2108.13264). Pure functions of arrays; larger values are better.

A *stratum* is a cell of a comparison (a task at a budget); each holds one row per run. Resampling keeps the
number of runs of every stratum, so that no resample consists of the easy cells only.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from experiments.agreement import NOTHING, Interval

Values = NDArray[np.float64]
Statistic = Callable[[Values], Values]
LEVEL = 0.95
"""Of the intervals, as in the paper."""
RESAMPLES = 2000
CHUNK = 4_000_000
"""Numbers that are resampled at once: 32 MB."""
SMOOTH = 1 / 25
"""Window of the moving average of a finetuning's margins, as a share of its steps."""


def moving_average(
    evaluations: NDArray[np.float64], values: NDArray[np.float64], window: int
) -> NDArray[np.float64]:
    """Mean over the rows of the last ``window`` evaluations; NaN values are left out.

    A window in evaluations, not in episodes, treats learners with long and short episodes alike.

    Args:
        evaluations: (k,) ascending, repeats allowed.
        values: (k,) what to average.
        window: evaluations, ≥ 1.

    Returns:
        (k,) averages.
    """
    known = ~np.isnan(values)
    sums = np.concatenate([[0.0], np.cumsum(np.where(known, values, 0.0))])
    counts = np.concatenate([[0], np.cumsum(known)])
    first = np.searchsorted(evaluations, evaluations - window, side="right")
    last = np.searchsorted(evaluations, evaluations, side="right")
    number = counts[last] - counts[first]
    return np.where(number > 0, (sums[last] - sums[first]) / np.maximum(number, 1), np.nan)


def swing(margins: Sequence[float]) -> float:
    """How far a discriminator's margin strays over a finetuning: deviation of its moving average.

    The margin of one batch of 16 images is mostly noise (deviation 1.6, where its moving average strays by
    0.4 to 1), so that the deviation of single steps says little of how steady a training is.

    Args:
        margins: (steps,) of every training step; none give NaN.
    """
    values = np.asarray(margins, dtype=np.float64)
    if not len(values):
        return math.nan
    window = max(1, round(len(values) * SMOOTH))
    smooth = moving_average(np.arange(1.0, len(values) + 1), values, window)
    return float(np.std(smooth[window - 1 :]))  # the first ones are means of fewer steps


class Curve(NamedTuple):
    """A statistic along an axis.

    Attributes:
        value: (T,) the estimates.
        low, high: (T,) ends of the intervals; NaN where no stratum has two runs.
    """

    value: Values
    low: Values
    high: Values


def iqm(values: Values) -> Values:
    """Interquartile mean over the first axis: the mean of the middle half of the runs, (n, …) → (…).

    ⌊n / 4⌋ runs are left out at either end, as ``scipy.stats.trim_mean`` with 0.25 does: below four runs it
    is the mean. More robust than the mean, and statistically more efficient than the median.
    """
    cut = len(values) // 4
    return np.sort(values, axis=0)[cut : len(values) - cut].mean(axis=0)


def iqm_curve(
    strata: Sequence[Values], *, level: float = LEVEL, resamples: int = RESAMPLES, seed: int = 0
) -> Curve:
    """IQM over all runs of all strata, point by point, with percentile bootstrap intervals.

    Args:
        strata: one (n_i, T) array per stratum, n_i ≥ 1 runs each.
        level: of the intervals.
        resamples: number of bootstrap samples.
        seed: of the resamples; equal ones at every point, so that the band does not rattle.
    """
    everyone = np.concatenate(strata)
    points = everyone.shape[1]
    value = iqm(everyone)
    if max(len(runs) for runs in strata) < 2:
        nothing = np.full(points, math.nan)
        return Curve(value, nothing, nothing)
    rows = resampled_rows([len(runs) for runs in strata], resamples, np.random.default_rng(seed))
    step = max(1, CHUNK // rows.size)
    tails = (1 - level) / 2, (1 + level) / 2
    ends = [
        # (runs, resamples, points): the statistic runs over the first axis
        np.quantile(iqm(everyone[rows.T, start : start + step]), tails, axis=0)
        for start in range(0, points, step)
    ]
    low, high = np.concatenate(ends, axis=1)
    return Curve(value, low, high)


def iqm_interval(
    strata: Sequence[Values], *, level: float = LEVEL, resamples: int = RESAMPLES, seed: int = 0
) -> Interval:
    """The same for one number per run: (n_i,) arrays."""
    curve = iqm_curve([runs[:, None] for runs in strata], level=level, resamples=resamples, seed=seed)
    return Interval(*(float(row[0]) for row in curve))


def resampled_rows(sizes: Sequence[int], resamples: int, rng: np.random.Generator) -> NDArray[np.int64]:
    """(resamples, sum of sizes) rows of the joined strata, drawn with replacement within each of them."""
    starts = np.cumsum([0, *sizes[:-1]])
    drawn = [
        start + rng.integers(size, size=(resamples, size)) for start, size in zip(starts, sizes, strict=True)
    ]
    return np.concatenate(drawn, axis=1)


def probability_of_improvement(
    first: Sequence[Values],
    second: Sequence[Values],
    *,
    level: float = LEVEL,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Interval:
    """How likely a run of the first is better than one of the second, in a stratum drawn at random.

    P(X > Y) = mean over strata of the share of pairs (x, y) with x > y, ties counted by half (Mann-Whitney
    U / (n k)). Intervals by resampling the runs of both within each stratum.

    Args:
        first, second: per stratum (n_i,) and (k_i,) values, in the same order of strata.
        level: of the interval.
        resamples: number of bootstrap samples.
        seed: of the resamples.

    Returns:
        The estimate and its interval; the ends are NaN where no stratum has two runs of either.
    """
    if not first:
        return NOTHING
    rng = np.random.default_rng(seed)
    estimate, drawn = 0.0, np.zeros(resamples)
    for x, y in zip(first, second, strict=True):
        wins = (x[:, None] > y[None, :]) + 0.5 * (x[:, None] == y[None, :])
        rows, columns = (rng.integers(len(z), size=(resamples, len(z))) for z in (x, y))
        estimate += float(wins.mean()) / len(first)
        drawn += wins[rows[:, :, None], columns[:, None, :]].mean((1, 2)) / len(first)
    if max(len(runs) for runs in (*first, *second)) < 2:
        return Interval(estimate, math.nan, math.nan)
    low, high = np.quantile(drawn, ((1 - level) / 2, (1 + level) / 2))
    return Interval(estimate, float(low), float(high))


def hold_last(evaluations: Sequence[int], values: Sequence[float], last: int) -> Values:
    """A step function at 1, 2, …, ``last`` evaluations.

    Args:
        evaluations: (k,) where a value begins to hold, ascending, the first ≤ 1.
        values: (k,) the values.
        last: number of points, ≥ 1.

    Returns:
        (last,) the value that holds at each number of evaluations.
    """
    place = np.searchsorted(np.asarray(evaluations), np.arange(1, last + 1), side="right") - 1
    return np.asarray(values, dtype=np.float64)[place]
