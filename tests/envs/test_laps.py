from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from envs.budget import keep_ratio, uniform_widths
from envs.laps import Laps, lap_length
from envs.toy import toy_network

NETWORK = toy_network("generator", (16, 32, 48, 32, 16), skips=True)


def test_zero_actions_keep_the_uniform_plan_without_projecting(monkeypatch: pytest.MonkeyPatch) -> None:
    laps = Laps(NETWORK, 0.3)
    before = laps.proportions.copy()
    monkeypatch.setattr("envs.laps.project", None)
    for _ in range(3 * laps.length):
        laps.decide(0.0)
    np.testing.assert_array_equal(laps.proportions, before)
    np.testing.assert_array_equal(laps.widths, uniform_widths(NETWORK, 0.3))


def test_a_lap_decides_every_group_but_one_and_frees_them_all() -> None:
    laps = Laps(NETWORK, 0.3)
    seen = []
    for turn in range(4):
        assert laps.decided.sum() == turn
        seen.append(laps.group)
        laps.decide(0.3)
    assert len(set(seen)) == 4
    assert laps.order[-1] not in seen
    assert not laps.decided.any()
    assert laps.group == seen[0]


@given(st.lists(st.floats(-1, 1), min_size=8, max_size=8), st.floats(0.07, 1.0))
def test_decided_widths_stay_and_every_plan_meets_the_budget(actions: list[float], budget: float) -> None:
    laps = Laps(NETWORK, budget)
    for action in actions:
        held = laps.decided_widths
        laps.decide(action)
        assert keep_ratio(NETWORK, laps.widths) <= budget * (1 + 1e-9)
        np.testing.assert_array_equal(laps.widths[held >= 0], held[held >= 0])


def test_actions_move_their_group_both_ways() -> None:
    for action in (-1.0, 1.0):
        laps = Laps(NETWORK, 0.3)
        group, before = laps.group, laps.widths.copy()
        laps.decide(action)
        assert np.sign(laps.widths[group] - before[group]) == action
        assert np.sign(laps.last_change) == action
        others = np.arange(len(before)) != group
        assert np.all(np.sign(laps.widths - before)[others] * action <= 0)  # the others make up for it


def test_a_single_group_ignores_its_action() -> None:
    network = toy_network("discriminator", (32,))
    laps = Laps(network, 0.5)
    assert lap_length(network) == laps.length == 1
    laps.decide(1.0)
    laps.decide(-1.0)
    np.testing.assert_array_equal(laps.widths, laps.uniform.widths)
    assert laps.last_action == 0.0


def test_the_last_group_fills_the_budget_better_than_in_forward_order() -> None:
    """The order of decisions is what leaves little of the budget unused."""
    unused: dict[str, list[float]] = {"descending": [], "forward": []}
    for order in unused:
        rng = np.random.default_rng(0)
        for _ in range(40):
            laps = Laps(NETWORK, 0.3)
            if order == "forward":
                laps.order = np.arange(5)
                laps.room = laps._find_room()
            for _ in range(laps.length):
                laps.decide(float(rng.uniform(-1, 1)))
            unused[order].append(laps.unused)
    assert np.mean(unused["descending"]) < 0.5 * np.mean(unused["forward"])
