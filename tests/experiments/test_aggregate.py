from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from experiments.aggregate import (
    hold_last,
    iqm,
    iqm_curve,
    iqm_interval,
    probability_of_improvement,
    resampled_rows,
    swing,
)


def test_iqm_by_hand_and_as_scipy() -> None:
    # of eight runs two go at either end: (2 + 3 + 4 + 5) / 4
    assert iqm(np.array([100.0, 2, 5, 4, 3, 1, 0, 7])) == pytest.approx(3.5)
    assert iqm(np.array([1.0, 2, 9])) == pytest.approx(4)  # below four runs: the mean
    rng = np.random.default_rng(0)
    for n in range(1, 12):
        values = rng.normal(size=(n, 3))
        np.testing.assert_allclose(iqm(values), stats.trim_mean(values, 0.25, axis=0))


def test_one_outlier_moves_the_mean_but_not_the_iqm() -> None:
    values = np.arange(8.0)
    spoiled = np.where(values == 7, 1000.0, values)
    assert iqm(spoiled) == iqm(values)


def test_rows_are_drawn_within_their_stratum() -> None:
    rows = resampled_rows([2, 3], 500, np.random.default_rng(0))
    assert rows.shape == (500, 5)
    assert set(rows[:, :2].flatten()) == {0, 1}
    assert set(rows[:, 2:].flatten()) == {2, 3, 4}


def test_intervals_shrink_with_runs_and_hold_the_truth() -> None:
    rng = np.random.default_rng(1)
    few, many = ([rng.normal(size=n)] for n in (6, 60))
    wide, narrow = iqm_interval(few), iqm_interval(many)
    assert wide.low < wide.value < wide.high
    assert narrow.high - narrow.low < wide.high - wide.low
    # the standard error of an IQM of 60 normal numbers is about 1.09 / √60
    assert narrow.high - narrow.low == pytest.approx(2 * 1.96 * 1.09 / math.sqrt(60), rel=0.3)
    assert iqm_interval(few) == wide  # the same seed


def test_strata_keep_their_share() -> None:
    """Two cells of constant runs: without strata the mean of a resample would move."""
    assert iqm_interval([np.zeros(5), np.ones(5)]) == pytest.approx((0.5, 0.5, 0.5))


def test_curves_are_point_by_point(monkeypatch: pytest.MonkeyPatch) -> None:
    runs = [np.random.default_rng(k).normal(size=(5, 7)) for k in range(2)]
    curve = iqm_curve(runs, resamples=300)
    one = iqm_interval([cell[:, 3] for cell in runs], resamples=300)
    assert (curve.value[3], curve.low[3], curve.high[3]) == pytest.approx(tuple(one))
    monkeypatch.setattr("experiments.aggregate.CHUNK", 1)  # one point at a time
    for whole, chunked in zip(curve, iqm_curve(runs, resamples=300), strict=True):
        np.testing.assert_array_equal(whole, chunked)


def test_a_single_run_has_no_interval() -> None:
    value, low, high = iqm_interval([np.array([2.0]), np.array([4.0])])
    assert (value, math.isnan(low), math.isnan(high)) == (3.0, True, True)
    value, low, high = probability_of_improvement([np.array([1.0])], [np.array([0.0])])
    assert (value, math.isnan(low), math.isnan(high)) == (1.0, True, True)


def test_probability_of_improvement_by_hand() -> None:
    # pairs: 3 > 1, 3 > 2, 3 = 3, 2 > 1, 2 = 2, 2 < 3
    x, y = np.array([3.0, 2.0]), np.array([1.0, 2.0, 3.0])
    u = stats.mannwhitneyu(x, y).statistic
    estimate = probability_of_improvement([x], [y])
    assert estimate.value == pytest.approx((1 + 1 + 0.5 + 1 + 0.5 + 0) / 6) == pytest.approx(u / 6)
    assert 0 <= estimate.low <= estimate.value <= estimate.high <= 1
    other = probability_of_improvement([y], [x])
    assert other.value == pytest.approx(1 - estimate.value)
    # two strata: the mean of theirs
    both = probability_of_improvement([x, np.array([5.0, 6.0])], [y, np.array([1.0, 2.0])])
    assert both.value == pytest.approx((estimate.value + 1) / 2)
    assert all(map(math.isnan, probability_of_improvement([], [])))


def test_clear_winners_have_certain_intervals() -> None:
    assert probability_of_improvement([np.arange(5.0) + 10], [np.arange(5.0)]) == (1.0, 1.0, 1.0)
    assert probability_of_improvement([np.zeros(5)], [np.zeros(5)]) == (0.5, 0.5, 0.5)


def test_a_value_holds_until_the_next() -> None:
    np.testing.assert_array_equal(hold_last([0, 2, 4], [0.0, 1.0, 3.0], 6), [0, 1, 1, 3, 3, 3])
    np.testing.assert_array_equal(hold_last([0], [0.5], 2), [0.5, 0.5])


def test_the_swing_is_that_of_the_moving_average() -> None:
    steps = np.array([0.0, 2.0, 2.0, 0.0, 4.0] * 10)  # a window of two steps
    means = (steps[1:] + steps[:-1]) / 2
    assert swing(steps.tolist()) == pytest.approx(means.std())
    rng = np.random.default_rng(0)
    slow, noise = np.linspace(0, 1, 1000), rng.normal(0, 2, 1000)
    assert swing((slow + noise).tolist()) < 0.25 * (slow + noise).std()
    assert swing((5 * slow + noise).tolist()) > 3 * swing((slow + noise).tolist())
    assert swing([3.0]) == 0
    assert math.isnan(swing([]))
