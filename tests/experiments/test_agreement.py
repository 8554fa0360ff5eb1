from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from experiments.agreement import (
    better_half,
    ceiling,
    kendall,
    kendall_gain,
    kendall_interval,
    paired_difference,
    regret,
    reliability,
)


def test_reliability_by_hand() -> None:
    """Means 2, 5, 5; MSB = 2 × 3 = 6; variances 2, 2, 0 of the seeds: MSW = 4/3."""
    found = reliability([[1, 3], [4, 6], [5, 5]])
    assert found.within == pytest.approx(4 / 3)
    assert found.between == pytest.approx((6 - 4 / 3) / 2)
    assert found.single.value == pytest.approx((6 - 4 / 3) / (6 + 4 / 3))
    assert found.average.value == pytest.approx(1 - (4 / 3) / 6)
    ratio = 6 / (4 / 3)
    low, high = ratio / stats.f.ppf(0.95, 2, 3), ratio * stats.f.ppf(0.95, 3, 2)
    assert found.single[1:] == pytest.approx([(low - 1) / (low + 1), (high - 1) / (high + 1)])
    assert found.average[1:] == pytest.approx([1 - 1 / low, 1 - 1 / high])


def test_reliability_at_its_ends() -> None:
    assert reliability([[1, 1], [2, 2]]).single == (1, 1, 1)
    noise = reliability([[1, 3], [3, 1]])
    assert (noise.between, noise.single.value) == (0.0, -1.0)
    assert math.isnan(reliability([[1, 1], [1, 1]]).single.value)
    with pytest.raises(ValueError, match="two or more of each"):
        reliability([[1], [2]])


def test_reliability_finds_the_variances_that_made_the_data() -> None:
    random = np.random.default_rng(0)
    table = random.normal(0, 2, (4000, 1)) + random.normal(0, 1, (4000, 2))
    found = reliability(table)
    assert found.between == pytest.approx(4, rel=0.1)
    assert found.within == pytest.approx(1, rel=0.1)
    assert found.single.low < 0.8 < found.single.high
    assert found.average.low < 4 / 4.5 < found.average.high


def test_kendall_by_hand() -> None:
    """Of six pairs five agree and one does not; with a tie, tau-b divides by √(5 · 6)."""
    assert kendall([1, 2, 3, 4], [1, 2, 4, 3]) == pytest.approx(4 / 6)
    assert kendall([1, 1, 3, 4], [1, 2, 3, 4]) == pytest.approx(5 / math.sqrt(5 * 6))
    assert math.isnan(kendall([1, 1, 1], [1, 2, 3]))
    assert math.isnan(kendall([1], [1]))


def test_the_resamples_are_those_of_scipy_written_out() -> None:
    """Quantiles 0 and 1 of the bootstrap are the extremes of tau-b over the same resamples."""
    random = np.random.default_rng(3)
    first, second = random.integers(0, 4, 7).astype(float), random.normal(size=7)
    counts = np.random.default_rng(5).multinomial(7, np.full(7, 1 / 7), size=40)
    rows = [np.repeat(np.arange(7), count) for count in counts]
    taus = [stats.kendalltau(first[row], second[row]).statistic for row in rows]
    taus = [tau for tau in taus if not math.isnan(tau)]
    found = kendall_interval(first, second, level=1.0, resamples=40, seed=5)
    assert found == pytest.approx((kendall(first, second), min(taus), max(taus)))


def test_kendall_interval_covers_and_narrows() -> None:
    random = np.random.default_rng(1)
    x = random.normal(size=200)
    y = x + random.normal(size=200)
    wide, narrow = kendall_interval(x[:20], y[:20]), kendall_interval(x, y)
    assert narrow.low < 0.5 < narrow.high  # tau of two normals with correlation √½
    assert narrow.high - narrow.low < 0.5 * (wide.high - wide.low)
    assert kendall_interval(x, x) == (1, 1, 1)
    assert kendall_interval(x, y) == narrow
    assert kendall_interval(x, y, seed=1) != narrow
    assert all(math.isnan(value) for value in kendall_interval(np.ones(4), np.arange(4)))


def test_a_gain_is_the_difference_of_two_taus_on_the_same_resamples() -> None:
    random = np.random.default_rng(0)
    metric = random.standard_normal(24)
    knows, guesses = metric + 0.3 * random.standard_normal(24), random.standard_normal(24)
    gain = kendall_gain(knows, guesses, metric, resamples=500)
    assert gain.value == pytest.approx(kendall(knows, metric) - kendall(guesses, metric))
    assert 0 < gain.low < gain.value < gain.high
    nothing = kendall_gain(knows, 2 * knows + 1, metric, resamples=500)  # the same order
    assert (nothing.value, nothing.low, nothing.high) == pytest.approx((0, 0, 0))
    assert math.isnan(kendall_gain(knows, np.ones(24), metric).value)


def test_better_half_and_regret_by_hand() -> None:
    assert better_half([5, 1, 4, 2, 3]).tolist() == [1, 3, 4]
    assert better_half([2, 1]).tolist() == [1]
    assert regret([0, 3, 1], [1.0, 2.0, 4.0]) == 1.0
    assert regret([9, 3, 1], [1.0, 2.0, 4.0]) == 0.0
    assert regret([3, 3, 1], [1.0, 2.0, 4.0]) == 0.5


def test_paired_difference_by_hand() -> None:
    """Differences 1, 2, 3: mean 2, standard error 1/√3, t(0.975, 2) = 4.3027."""
    found = paired_difference([2, 4, 6], [1, 2, 3])
    assert found == pytest.approx((2, 2 - 4.302653 / math.sqrt(3), 2 + 4.302653 / math.sqrt(3)), rel=1e-6)
    assert paired_difference([3], [1]) == (2, -math.inf, math.inf)


def test_the_ceiling_is_1_without_noise_and_falls_with_it() -> None:
    truth = np.arange(12.0)[:, None]
    random = np.random.default_rng(0)
    noise = random.normal(size=(12, 2))
    assert ceiling(truth + np.zeros((12, 2))) == (1, 1, 1)
    taus = [ceiling(truth + scale * noise).value for scale in (0.5, 2.0, 6.0)]
    assert 1 > taus[0] > taus[1] > taus[2] > 0
    assert ceiling(truth + 2 * noise, better=True).value < taus[1]
    assert math.isnan(ceiling([[1, 3], [3, 1]]).value)


def test_the_ceiling_is_what_the_truth_gets() -> None:
    """Over many studies, tau of the true values against the seeds' mean is the mean ceiling."""
    random = np.random.default_rng(2)
    reached, allowed = [], []
    for number in range(60):
        truth = random.normal(0, 1, 30)
        table = truth[:, None] + random.normal(0, 0.8, (30, 2))
        reached.append(kendall(truth, table.mean(1)))
        allowed.append(ceiling(table, draws=50, seed=number).value)
    assert np.mean(allowed) == pytest.approx(np.mean(reached), abs=0.03)
