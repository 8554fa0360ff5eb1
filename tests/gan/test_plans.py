from __future__ import annotations

import json

import numpy as np
import pytest

from gan.plans import Plan

PLAN = Plan.of({"generator": (8, 4), "discriminator": (2,)}, "l1")


def test_numpy_widths_become_ints():
    made = Plan.of({"generator": np.array([8, 4]), "discriminator": [np.int32(2)]}, "l1")
    assert made == PLAN
    assert all(type(width) is int for agent in made for width in made[agent])


def test_a_plan_gives_its_widths_by_agent():
    assert PLAN["generator"] == (8, 4)
    assert PLAN["discriminator"] == (2,)
    assert PLAN.agents == tuple(PLAN) == ("generator", "discriminator")
    with pytest.raises(KeyError, match="no network 'critic'; it has generator, discriminator"):
        PLAN["critic"]


def test_equal_plans_hash_alike():
    assert len({PLAN, Plan.of({"generator": [8, 4], "discriminator": [2]}, "l1")}) == 1


@pytest.mark.parametrize(
    "other",
    [
        Plan.of({"generator": (8, 4), "discriminator": (2,)}, "l2"),
        Plan.of({"generator": (8, 5), "discriminator": (2,)}, "l1"),
        Plan.of({"generator": (8, 4)}, "l1"),
        Plan.of({"generator": (4, 8), "discriminator": (2,)}, "l1"),
        Plan.of({"generator": (8, 4, 2), "discriminator": ()}, "l1"),
    ],
)
def test_different_plans_have_different_keys(other):
    assert other != PLAN
    assert other.key != PLAN.key


def test_the_key_is_fixed():
    assert PLAN.key == '{"widths":{"generator":[8,4],"discriminator":[2]},"ranking":"l1"}'


def test_a_plan_survives_json():
    assert Plan.from_dict(json.loads(PLAN.key)) == PLAN
    assert Plan.from_dict(json.loads(json.dumps(PLAN.to_dict()))).key == PLAN.key


def test_what_is_no_plan_is_refused():
    with pytest.raises(ValueError, match=r"needs the key 'widths' .* got keys \['gaps', 'ranking'\]"):
        Plan.from_dict({"gaps": {}, "ranking": "l1"})


@pytest.mark.parametrize("row", [[8, 8.5], [True, 8], [0, 8], "8", 8])
def test_widths_are_whole_numbers(row: object) -> None:
    with pytest.raises(ValueError, match=r"widths of 'generator' are .* whole numbers"):
        Plan.from_dict({"widths": {"generator": row}})


def test_replacing_one_network_leaves_the_others_and_the_plan():
    changed = PLAN.replace("discriminator", np.array([7]))
    assert changed == Plan.of({"generator": (8, 4), "discriminator": (7,)}, "l1")
    assert PLAN["discriminator"] == (2,)
    with pytest.raises(KeyError, match="no network 'critic'"):
        PLAN.replace("critic", (1,))
