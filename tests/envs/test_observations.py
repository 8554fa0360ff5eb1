from __future__ import annotations

import math

import numpy as np
import pytest

from envs.budget import LARGEST_MOVE
from envs.laps import Laps
from envs.observations import (
    LOCAL_FIELDS,
    STATE_FIELDS,
    Feedback,
    Field,
    assign_slots,
    build_space,
    build_vector,
    group_facts,
    observe_local,
    observe_state,
    resample,
)
from envs.toy import toy_network
from gan.evaluations import FAMILIES

FIELDS = (Field("a", 0, 1, "first"), Field("b", -2, 2, "second"))


def as_dict(fields: tuple[Field, ...], vector: np.ndarray) -> dict[str, float]:
    return {field.name: float(value) for field, value in zip(fields, vector, strict=True)}


def test_vector_keeps_the_order_and_clips() -> None:
    vector = build_vector(FIELDS, {"b": -7.0, "a": 0.5})
    np.testing.assert_array_equal(vector, np.array([0.5, -2.0], dtype=np.float32))
    assert vector.dtype == np.float32
    assert build_space(FIELDS).contains(vector)


def test_vector_refuses_other_names_and_what_is_not_finite() -> None:
    with pytest.raises(ValueError, match=r"\['b', 'c'\]"):
        build_vector(FIELDS, {"a": 0.0, "c": 0.0})
    with pytest.raises(ValueError, match="b are not"):
        build_vector(FIELDS, {"a": 0.0, "b": math.nan})


@pytest.mark.parametrize("fields", [LOCAL_FIELDS, STATE_FIELDS])
def test_fields_are_named_once_and_explained(fields: tuple[Field, ...]) -> None:
    assert len({field.name for field in fields}) == len(fields)
    assert all(field.low < field.high and field.meaning for field in fields)


def test_resample_by_hand() -> None:
    np.testing.assert_allclose(resample(np.array([0.0, 2.0, 4.0]), 5), [0, 1, 2, 3, 4])
    np.testing.assert_allclose(resample(np.array([3.0]), 4), 3.0)


def test_group_facts_by_hand() -> None:
    network = toy_network("generator", (4, 10), multiple=2, importance_decay=0.0, fixed_in=1, fixed_out=1)
    facts = group_facts(network)
    np.testing.assert_array_equal(facts.position, [0, 1])
    np.testing.assert_allclose(facts.top, [[1 / 4, 1 / 4, 1 / 2], [1 / 10, 3 / 10, 5 / 10]])
    np.testing.assert_allclose(facts.effective, 1.0)
    dense, cut = network.cost_of(np.array([4, 10])), network.cost_of(np.array([2, 10]))
    assert facts.cost_share[0] == pytest.approx(1 - cut / dense)


def test_concentrated_importance_shows() -> None:
    flat, steep = (
        group_facts(toy_network("generator", (32, 32), importance_decay=decay)) for decay in (0.1, 10.0)
    )
    assert np.all(steep.top > flat.top)
    assert np.all(steep.effective < flat.effective)


def test_local_observation_says_what_happened() -> None:
    network = toy_network("generator", (16, 32, 16))
    peer = Laps(toy_network("discriminator", (16, 32)), 0.4)
    laps = Laps(network, 0.5)
    group = laps.group
    laps.decide(1.0)
    peer.decide(-0.5)
    feedback = Feedback(0.5, 1.0, {"mmd_gap": 1.0}, 0.75, {"mmd_gap": 1.5, "l1_gap": -9.0}, 3.0)
    seen = as_dict(LOCAL_FIELDS, observe_local(laps, peer, group_facts(network), feedback))
    assert seen["last_action"] == 1.0
    assert seen["last_change"] > 0
    assert laps.widths[group] > laps.uniform.widths[group]
    assert seen["lap_left"] == 0.5
    assert seen["progress"] == 0.5
    assert seen["budget"] == 0.5
    assert seen["log_budget"] == pytest.approx(-math.log10(0.5) / 3)
    assert (seen["is_discriminator"], seen["has_peer"]) == (0.0, 1.0)
    assert seen["peer_last_action"] == -0.5
    assert seen["peer_budget"] == pytest.approx(0.4)
    assert seen["feedback_reward"] == 0.25  # in the unit of one term: the weights sum to 3
    assert (seen["feedback_mmd"], seen["feedback_l1"], seen["feedback_crowd"]) == (1.5, -2.0, 0.0)
    alone = as_dict(LOCAL_FIELDS, observe_local(laps, None, group_facts(network), feedback))
    assert {name: value for name, value in alone.items() if "peer" in name and value} == {}


def test_state_fills_slots_and_masks_the_rest() -> None:
    network = toy_network("generator", (16, 32, 16))
    laps = Laps(network, 0.5)
    laps.decide(1.0)
    feedback = Feedback(0.5, 1.25, dict.fromkeys(FAMILIES, 0.5), weight=5.0)
    seen = as_dict(
        STATE_FIELDS, observe_state({"generator_2": laps}, {"generator_2": group_facts(network)}, feedback)
    )
    assert (seen["potential"], seen["score_mmd"]) == (0.25, 0.5)
    assert seen["generator_2.mask"] == 1.0
    assert seen["generator_2.last_action"] == 1.0
    moved = float((laps.proportions / laps.uniform.proportions).max())
    highest = max(seen[f"generator_2.profile_{i}"] for i in range(8))
    assert highest == pytest.approx(math.log(moved) / math.log(LARGEST_MOVE), abs=1e-6)
    assert highest > 0.2
    empty = {name: value for name, value in seen.items() if name.startswith(("generator_1", "discriminator"))}
    assert set(empty.values()) == {0.0}


def test_slots_do_not_depend_on_the_order_of_agents() -> None:
    names = ("discriminator_B", "generator_B", "discriminator_A", "generator_A")
    networks = {name: toy_network(name.split("_")[0], (8, 8)) for name in names}
    assert assign_slots(networks) == {
        "generator_1": "generator_A",
        "generator_2": "generator_B",
        "discriminator_1": "discriminator_A",
        "discriminator_2": "discriminator_B",
    }
    with pytest.raises(ValueError, match="at most 2 networks of a kind"):
        assign_slots({**networks, "generator_C": networks["generator_A"]})
