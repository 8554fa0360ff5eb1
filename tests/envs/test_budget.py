from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from envs.budget import (
    Budget,
    allowed_cost,
    decision_order,
    find_room,
    increment_costs,
    keep_ratio,
    levels,
    list_increments,
    nearest_width,
    parse_budgets,
    project,
    random_proportions,
    reachable,
    uniform,
    uniform_widths,
)
from envs.toy import toy_network
from gan.errors import UserError
from gan.evaluations import PrunableNetwork
from tests.envs.conftest import linear_network

AGENTS = ("generator_A", "generator_B", "discriminator_A")


# --- budgets -----------------------------------------------------------------------------------------


def test_parse_bare_value_is_for_the_generators() -> None:
    assert parse_budgets("0.2", ["generator", "discriminator"]) == {
        "generator": Budget(0.2, 0.2),
        "discriminator": Budget(0.5, 0.5),
    }


def test_parse_names_kinds_and_ranges() -> None:
    assert parse_budgets("generator=0.2, discriminator=0.1:0.5,generator_B=0.3", AGENTS) == {
        "generator_A": Budget(0.2, 0.2),
        "generator_B": Budget(0.3, 0.3),
        "discriminator_A": Budget(0.1, 0.5),
    }
    assert parse_budgets("0.05:0.5", ["generator"]) == {"generator": Budget(0.05, 0.5)}


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("abc", "got 'abc'"),
        ("", "got ''"),
        ("0", "above 0, at most 1 .* got 0"),
        ("1.5", "above 0, at most 1 .* got 1.5"),
        ("nan", "above 0, at most 1 .* got nan"),
        ("-0.1", "got -0.1"),
        ("0.5:0.05", "reversed; write 0.05:0.5"),
        ("0.1:0.2:0.3", "has 3 parts"),
        ("genrator_A=0.1", "did you mean 'generator_A'"),
        ("generator=0.1,generator=0.2", "twice"),
        ("0.1,0.2", "twice"),
    ],
)
def test_parse_refuses_with_one_sentence(text: str, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        parse_budgets(text, AGENTS)


def test_range_is_log_linear() -> None:
    budget = Budget(0.05, 0.2)
    assert budget.at(0.5) == pytest.approx(0.1)
    assert budget.position(0.1) == pytest.approx(0.5)
    assert (budget.at(0.0), budget.at(1.0)) == (0.05, 0.2)
    drawn = [budget.draw(np.random.default_rng(seed)) for seed in range(200)]
    assert 0.05 <= min(drawn) < 0.055
    assert 0.18 < max(drawn) <= 0.2
    assert np.median(drawn) == pytest.approx(0.1, rel=0.15)


# --- projection: by hand -----------------------------------------------------------------------------

# widths 8 and 4, one channel costs 1 and 2: dense 16
# increments of group 0 appear at the factors 3/8, 5/8, 7/8, that of group 1 at 3/4
HAND = linear_network((8, 4), (1, 2), multiple=2)


def test_increments_by_hand() -> None:
    increments = list_increments(linear_network((8, 5, 1), (1, 1, 1), multiple=2))
    np.testing.assert_array_equal(increments.group, [0, 0, 0, 1, 1])
    np.testing.assert_array_equal(increments.before, [2, 4, 6, 2, 4])
    np.testing.assert_array_equal(increments.after, [4, 6, 8, 4, 5])  # the multiple does not divide 5


@pytest.mark.parametrize(
    ("budget", "widths", "unused"),
    [(6 / 16, (2, 2), 0.0), (0.5, (4, 2), 0.0), (9.5 / 16, (4, 2), 1.5 / 9.5), (12 / 16, (6, 2), 2 / 12)],
)
def test_uniform_by_hand(budget: float, widths: tuple[int, int], unused: float) -> None:
    projected = uniform(HAND, budget)
    np.testing.assert_array_equal(projected.widths, widths)
    assert projected.unused == pytest.approx(unused, abs=1e-9)


def test_proportions_lie_between_the_last_increment_and_the_next() -> None:
    np.testing.assert_allclose(uniform(HAND, 0.5).proportions, math.sqrt(3 / 8 * 5 / 8))
    # nothing taken: the group that would grow first (at 3/8) stands at its minimum, 2 of 8
    np.testing.assert_allclose(uniform(HAND, 6 / 16).proportions, 2 / 8)
    np.testing.assert_array_equal(uniform(HAND, 1.0).proportions, 1.0)


def test_ties_go_forward() -> None:
    # with proportions 1 and 2, both first increments appear at 3/8
    projected = project(HAND, np.array([1.0, 2.0]), 8 / 16)
    np.testing.assert_array_equal(projected.widths, (4, 2))
    np.testing.assert_allclose(projected.proportions, (3 / 8, 3 / 4))
    np.testing.assert_array_equal(project(HAND, np.array([0.1, 0.2]), 8 / 16).widths, (4, 2))


def test_decided_groups_are_held_by_hand() -> None:
    projected = project(HAND, np.array([0.3, 0.9]), 12 / 16, np.array([-1, 4]))
    np.testing.assert_array_equal(projected.widths, (4, 4))
    assert projected.proportions[1] == 0.9
    with pytest.raises(UserError, match="decided"):
        project(HAND, np.ones(2), 7 / 16, np.array([-1, 4]))


def test_unreachable_budget_is_refused_with_the_range() -> None:
    assert reachable(HAND) == (6 / 16, 1.0)
    with pytest.raises(UserError, match=r"0\.3 .* give a budget from 0\.375 to 1"):
        uniform(HAND, 0.3)


@pytest.mark.parametrize("budget", [0.0, -1.0, 1.5, math.nan, math.inf])
def test_budget_that_is_no_keep_ratio_is_refused(budget: float) -> None:
    with pytest.raises(UserError, match="above 0, at most 1"):
        Budget(budget, budget)


@pytest.mark.parametrize("proportions", [[1.0], [1.0, 0.0], [1.0, -1.0], [1.0, math.nan], [1.0, math.inf]])
def test_proportions_must_be_positive_numbers(proportions: list[float]) -> None:
    with pytest.raises(ValueError, match="2 positive finite numbers"):
        project(HAND, np.array(proportions), 0.5)


def test_nearest_width() -> None:
    network = linear_network((10,), (1,), multiple=4)
    np.testing.assert_array_equal(levels(network, 0), [4, 8, 10])
    widths = [nearest_width(network, 0, p) for p in (0.01, 0.59, 0.6, 0.89, 0.9, 1.0)]
    assert widths == [4, 4, 8, 8, 10, 10]


# --- projection: properties --------------------------------------------------------------------------


@st.composite
def networks(draw: st.DrawFn) -> PrunableNetwork:
    channels = draw(st.lists(st.integers(1, 40), min_size=1, max_size=6))
    multiple = draw(st.sampled_from([1, 2, 4, 8]))
    skips = draw(st.booleans())
    return toy_network("generator", channels, multiple=multiple, image=32, skips=skips)


PROPORTION = st.one_of(st.sampled_from([0.1, 0.2, 0.25, 0.3, 0.5, 0.6, 0.9, 1.0, 2.0]), st.floats(0.01, 10.0))


@st.composite
def problems(draw: st.DrawFn) -> tuple[PrunableNetwork, NDArray[np.float64], float, NDArray[np.int64]]:
    """A network, proportions, a reachable budget, and feasible decided widths (-1 = free)."""
    network = draw(networks())
    n = len(network.groups)
    proportions = np.array(draw(st.lists(PROPORTION, min_size=n, max_size=n)))
    low = reachable(network)[0]
    budget = min(1.0, low * (1 / low) ** draw(st.floats(0.0, 1.0)))
    held = draw(st.lists(st.booleans(), min_size=n, max_size=n))
    whole = project(network, np.array(draw(st.lists(PROPORTION, min_size=n, max_size=n))), budget).widths
    return network, proportions, budget, np.where(held, whole, -1)


@given(problems())
def test_projection_meets_the_budget_and_holds_decided_widths(problem) -> None:
    network, proportions, budget, decided = problem
    projected = project(network, proportions, budget, decided)
    assert keep_ratio(network, projected.widths) <= budget * (1 + 1e-9)
    assert 0.0 <= projected.unused < 1.0
    held = decided >= 0
    np.testing.assert_array_equal(projected.widths[held], decided[held])
    np.testing.assert_array_equal(projected.proportions[held], proportions[held])
    for g, width in enumerate(projected.widths):
        assert width in levels(network, g)
    free = projected.proportions[~held]
    assert np.all((free > 0) & (free <= 1))


@given(problems())
def test_next_increment_would_exceed_the_budget(problem) -> None:
    network, proportions, budget, decided = problem
    widths = project(network, proportions, budget, decided).widths
    candidates = []
    for g in np.flatnonzero(decided < 0):
        wider = [width for width in levels(network, g) if width > widths[g]]
        if wider:
            middle = (widths[g] + wider[0]) / 2
            candidates.append((middle / network.groups[g].channels / proportions[g], g, wider[0]))
    if candidates:
        first = min(factor for factor, _, _ in candidates)
        _, g, width = next(c for c in candidates if c[0] <= first * (1 + 1e-8))  # ties: forward order
        grown = widths.copy()
        grown[g] = width
        assert network.cost_of(grown) > allowed_cost(network, budget)


@given(problems(), st.floats(0.01, 100.0))
def test_projection_is_idempotent_and_blind_to_a_common_factor(problem, factor: float) -> None:
    network, proportions, budget, decided = problem
    once = project(network, proportions, budget, decided)
    twice = project(network, once.proportions, budget, decided)
    np.testing.assert_array_equal(twice.widths, once.widths)
    scaled = project(network, proportions * factor, budget, decided)
    np.testing.assert_array_equal(scaled.widths, once.widths)
    free = decided < 0
    np.testing.assert_allclose(scaled.proportions[free], once.proportions[free], rtol=1e-9)


@given(problems(), st.floats(0.0, 1.0))
def test_projection_is_monotone_in_the_budget(problem, t: float) -> None:
    network, proportions, budget, decided = problem
    larger = min(1.0, budget * (1 / budget) ** t)
    less = project(network, proportions, budget, decided)
    more = project(network, proportions, larger, decided)
    assert np.all(more.widths >= less.widths)


@given(networks())
def test_a_budget_below_the_smallest_plan_is_refused(network: PrunableNetwork) -> None:
    low, high = reachable(network)
    assert high == 1.0
    np.testing.assert_array_equal(uniform_widths(network, low), network.minimum)
    np.testing.assert_array_equal(uniform_widths(network, 1.0), network.channels)
    with pytest.raises(UserError, match="cannot be reached"):
        uniform(network, low * 0.99)


@given(problems())
def test_widths_are_the_rounded_view_of_the_proportions(problem) -> None:
    network, proportions, budget, decided = problem
    projected = project(network, proportions, budget, decided)
    factors = [
        middle / network.groups[g].channels / projected.proportions[g]
        for g in np.flatnonzero(decided < 0)
        for middle in (levels(network, g)[1:] + levels(network, g)[:-1]) / 2
    ]
    if any(abs(factor - 1) < 1e-8 for factor in factors):
        return  # ties at the edge of the budget: forward order decides, not rounding
    for g in np.flatnonzero(decided < 0):
        assert nearest_width(network, g, projected.proportions[g]) == projected.widths[g]


# --- decisions ---------------------------------------------------------------------------------------


def test_room_by_hand() -> None:
    free = np.array([-1, -1])
    # of 12, the other group costs 4 at its minimum, which leaves 8; at full width 8, which leaves 4 to fill
    room = find_room(HAND, 0, 0.6, 12 / 16, free)
    assert room.widest == 8
    assert (room.start, room.high, room.low) == (0.6, 1.0, 0.5)
    assert room.moved(0.0) == 0.6
    assert room.moved(1.0) == pytest.approx(1.0)
    assert room.moved(-1.0) == pytest.approx(0.5)
    assert room.moved(0.5) == pytest.approx(math.sqrt(0.6 * 1.0))
    # a factor of six at most
    wide = linear_network((40, 40), (1, 1), multiple=1)
    assert find_room(wide, 0, 0.05, 0.3, free).high == pytest.approx(0.3)
    assert find_room(wide, 0, 0.3, 0.3, free).low == pytest.approx(0.05)
    # a group below one multiple moves from there on
    assert find_room(HAND, 0, 0.1, 12 / 16, free).start == 0.25


@given(problems(), st.floats(-1.0, 1.0), st.integers(0, 5))
def test_every_decision_leaves_a_feasible_plan(problem, action: float, pick: int) -> None:
    network, proportions, budget, decided = problem
    group = pick % len(network.groups)
    decided[group] = -1
    now = project(network, proportions, budget, decided)
    room = find_room(network, group, now.proportions[group], budget, decided)
    assert 0 < room.low <= room.start <= room.high <= 1
    held = decided.copy()
    held[group] = min(nearest_width(network, group, room.moved(action)), room.widest)
    after = project(network, now.proportions, budget, held)
    assert keep_ratio(network, after.widths) <= budget * (1 + 1e-9)


def test_decisions_begin_with_the_dearest_increments() -> None:
    network = linear_network((8, 8, 8), (1, 3, 1), multiple=2)
    np.testing.assert_array_equal(increment_costs(network, np.array([4, 4, 8])), [2, 6, 2])
    np.testing.assert_array_equal(decision_order(network, np.array([4, 4, 8])), [1, 0, 2])
    assert increment_costs(linear_network((2, 8), (1, 1), 2), np.array([2, 8])).tolist() == [0, 2]


def test_random_proportions_are_log_normal() -> None:
    network = toy_network("generator", (8,) * 400)
    draws = np.log(random_proportions(network, np.random.default_rng(0), sigma=0.5))
    assert draws.std() == pytest.approx(0.5, rel=0.1)
    assert abs(draws.mean()) < 0.1
