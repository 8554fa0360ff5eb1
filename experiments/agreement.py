"""How well a score agrees with what it should predict, and how well it could: pure functions of arrays.

Everywhere a *metric* is lower-better and a *score* higher-better; a table of results is (k plans, n seeds).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

Values = NDArray[np.float64]
LEVEL = 0.9
"""Of every interval that is not given another one."""
RESAMPLES = 2000


class Interval(NamedTuple):
    """A number and where it lies.

    Attributes:
        value: the estimate; NaN where it is not defined.
        low, high: ends of the interval.
    """

    value: float
    low: float
    high: float


NOTHING = Interval(math.nan, math.nan, math.nan)


class Reliability(NamedTuple):
    """How much of the differences between results is due to the plans.

    Attributes:
        single: intraclass correlation ICC(1) of one seed.
        average: that of the mean over the seeds, ICC(k) in the literature.
        between: variance of the plans' true values, ≥ 0.
        within: variance between seeds of one plan.
    """

    single: Interval
    average: Interval
    between: float
    within: float


def reliability(results: ArrayLike, level: float = LEVEL) -> Reliability:
    """One-way random effects: ``result = plan + seed noise``.

    ICC(1) = (MSB − MSW) / (MSB + (n − 1) MSW), of the mean (MSB − MSW) / MSB, with exact intervals from the
    F distribution: Shrout & Fleiss, "Intraclass Correlations", Psychological Bulletin 86, 1979.

    Args:
        results: (k, n), k ≥ 2 plans, n ≥ 2 seeds.
        level: of the intervals.

    Raises:
        ValueError: another shape.
    """
    table = _table(results)
    k, n = table.shape
    msb = n * float(table.mean(1).var(ddof=1))
    msw = float(table.var(1, ddof=1).mean())
    between = max(0.0, (msb - msw) / n)
    if msw == 0.0:
        perfect = NOTHING if msb == 0.0 else Interval(1.0, 1.0, 1.0)
        return Reliability(perfect, perfect, between, msw)
    ratio, tail = msb / msw, (1 + level) / 2
    ratios = (
        ratio,
        ratio / float(stats.f.ppf(tail, k - 1, k * (n - 1))),
        ratio * float(stats.f.ppf(tail, k * (n - 1), k - 1)),
    )
    single = Interval(*((f - 1) / (f + n - 1) for f in ratios))
    average = Interval(*(1 - 1 / f if f > 0 else -math.inf for f in ratios))
    return Reliability(single, average, between, msw)


def _table(results: ArrayLike) -> Values:
    table = np.asarray(results, dtype=np.float64)
    if table.ndim != 2 or min(table.shape) < 2:
        raise ValueError(f"results are {table.shape}; they must be (plans, seeds), two or more of each")
    return table


def kendall(first: ArrayLike, second: ArrayLike) -> float:
    """Kendall's tau-b of two rows of numbers; NaN where one of them is constant or shorter than 2."""
    first, second = np.asarray(first, dtype=np.float64), np.asarray(second, dtype=np.float64)
    if len(first) < 2 or np.ptp(first) == 0 or np.ptp(second) == 0:
        return math.nan
    return float(stats.kendalltau(first, second).statistic)


def kendall_interval(
    first: ArrayLike,
    second: ArrayLike,
    *,
    level: float = LEVEL,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Interval:
    """Tau-b with a percentile bootstrap interval over the plans (Efron & Tibshirani 1993, ch. 13).

    A resample is a count per plan, and tau a quotient of quadratic forms in these counts: pairs of one plan
    with itself are ties and drop out, as in tau-b of the resample written out.

    Args:
        first, second: (k,) two numbers per plan.
        level: of the interval.
        resamples: number of bootstrap samples; those in which a row is constant are left out.
        seed: of the resamples: equal seeds and lengths, equal resamples.
    """
    tau = kendall(first, second)
    if math.isnan(tau):
        return NOTHING
    taus = _resampled(first, second, resamples, seed)
    return Interval(tau, *interval_ends(taus[~np.isnan(taus)], level))


def kendall_gain(
    first: ArrayLike,
    second: ArrayLike,
    metric: ArrayLike,
    *,
    level: float = LEVEL,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Interval:
    """Tau-b of ``first`` with ``metric`` minus that of ``second``, with a bootstrap interval over the plans.

    Both are taken on the same resamples: what two scores share does not widen the interval.

    Args:
        first, second, metric: (k,) numbers per plan.
        level, resamples, seed: as in :func:`kendall_interval`.

    Returns:
        NaN where one of them is constant.
    """
    gain = kendall(first, metric) - kendall(second, metric)
    if math.isnan(gain):
        return NOTHING
    gains = np.subtract(*(_resampled(score, metric, resamples, seed) for score in (first, second)))
    return Interval(gain, *interval_ends(gains[~np.isnan(gains)], level))


def _resampled(first: ArrayLike, second: ArrayLike, resamples: int, seed: int) -> Values:
    """(resamples,) tau-b of bootstrap samples; NaN where a row is constant in one."""
    one, two = (np.asarray(row, dtype=np.float64) for row in (first, second))
    k = len(one)
    counts = np.random.default_rng(seed).multinomial(k, np.full(k, 1 / k), size=resamples).astype(np.float64)
    return weighted_taus(one[None], -two, counts)[:, 0]


def weighted_taus(scores: Values, metric: Values, counts: Values) -> Values:
    """Tau-b of many scores with a lower-better metric, in many samples of the plans.

    Args:
        scores: (v, k).
        metric: (k,).
        counts: (b, k) how often each plan is in a sample.

    Returns:
        (b, v); NaN where a sample has no pair.
    """
    other = -pair_signs(metric)
    pairs = np.einsum("bi,bi->b", counts @ np.abs(other), counts)
    taus = np.empty((len(counts), len(scores)))
    for place, row in enumerate(scores):
        signs = pair_signs(row)
        agree = np.einsum("bi,bi->b", counts @ (signs * other), counts)
        own = np.einsum("bi,bi->b", counts @ np.abs(signs), counts)
        with np.errstate(invalid="ignore", divide="ignore"):
            taus[:, place] = agree / np.sqrt(own * pairs)
    return taus


def interval_ends(values: Values, level: float) -> tuple[float, float]:
    """The quantiles between which the middle ``level`` of the values lies."""
    low, high = np.quantile(values, ((1 - level) / 2, (1 + level) / 2))
    return float(low), float(high)


def pair_signs(rows: Values) -> Values:
    """(…, k) → (…, k, k): the sign of every difference."""
    return np.sign(rows[..., :, None] - rows[..., None, :])


def better_half(metric: ArrayLike) -> NDArray[np.int64]:
    """Indices of the ⌈k / 2⌉ plans with the lowest metric, in ascending order of the index."""
    metric = np.asarray(metric, dtype=np.float64)
    return np.sort(np.argsort(metric, kind="stable")[: (len(metric) + 1) // 2])


def regret(score: ArrayLike, metric: ArrayLike) -> float:
    """(metric of the plan with the highest score − lowest metric) / lowest metric; 0 = the best was picked.

    Where several plans share the highest score, their mean metric counts.
    """
    score, metric = np.asarray(score, dtype=np.float64), np.asarray(metric, dtype=np.float64)
    best = float(metric.min())
    return (float(metric[score == score.max()].mean()) - best) / best


def paired_difference(first: ArrayLike, second: ArrayLike, level: float = 0.95) -> Interval:
    """Mean of ``first − second`` over pairs, with Student's t interval; unbounded for a single pair."""
    differences = np.asarray(first, dtype=np.float64) - np.asarray(second, dtype=np.float64)
    n, mean = len(differences), float(differences.mean())
    if n < 2:
        return Interval(mean, -math.inf, math.inf)
    half = float(stats.t.ppf((1 + level) / 2, n - 1)) * float(differences.std(ddof=1)) / math.sqrt(n)
    return Interval(mean, mean - half, mean + half)


def ceiling(
    results: ArrayLike,
    *,
    better: bool = False,
    level: float = LEVEL,
    draws: int = RESAMPLES,
    seed: int = 0,
) -> Interval:
    """The tau that the plans' true values themselves would get against the mean over the seeds.

    No score can be expected to do better. Simulated from the variance components of :func:`reliability`:
    true values are drawn around the plans' means, shrunken towards the grand mean by the reliability r
    (variance between × (1 − r), the empirical-Bayes posterior), new results around those (variance
    within / n).

    Args:
        results: (k, n), k ≥ 2 plans, n ≥ 2 seeds.
        better: tau over the half with the lower new results only.
        level: share of the draws that the interval holds.
        draws: simulated studies.
        seed: of the draws.

    Returns:
        Mean tau over the draws and the interval of the draws; NaN where plans do not differ at all.
    """
    table = _table(results)
    k, n = table.shape
    parts = reliability(table)
    if parts.between == 0.0:
        return NOTHING
    noise = parts.within / n
    r = parts.between / (parts.between + noise)
    means = table.mean(1)
    random = np.random.default_rng(seed)
    centres = means.mean() + r * (means - means.mean())
    truth = centres + math.sqrt(parts.between * (1 - r)) * random.standard_normal((draws, k))
    seen = truth + math.sqrt(noise) * random.standard_normal((draws, k))
    if better:
        rows = np.argsort(seen, axis=1)[:, : (k + 1) // 2]
        truth, seen = (np.take_along_axis(values, rows, 1) for values in (truth, seen))
    pairs = truth.shape[1] * (truth.shape[1] - 1)
    if pairs == 0:
        return NOTHING
    taus = (pair_signs(truth) * pair_signs(seen)).sum((1, 2)) / pairs  # continuous draws have no ties
    return Interval(float(taus.mean()), *interval_ends(taus, level))
