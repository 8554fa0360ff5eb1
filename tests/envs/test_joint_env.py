from __future__ import annotations

import warnings

import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env as gymnasium_check
from stable_baselines3.common.env_checker import check_env as sb3_check

from envs.joint_env import JointPruningEnv
from envs.observations import LOCAL_FIELDS, STATE_FIELDS
from tests.envs.conftest import MakeEnv


@pytest.mark.parametrize("reward", ["step", "final"])
def test_gymnasium_and_sb3_checks(make: MakeEnv, reward: str) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("error")
        # without a registered id it cannot make another copy to render; there is nothing to render
        warnings.filterwarnings("ignore", message=".*Not able to test alternative render modes")
        gymnasium_check(JointPruningEnv(make(budgets={"generator": "0.1:0.6"}, reward=reward)))
    with warnings.catch_warnings():
        warnings.filterwarnings("error")
        sb3_check(JointPruningEnv(make(reward=reward)))


def test_joint_view_is_the_team(make: MakeEnv) -> None:
    joint, team = JointPruningEnv(make()), make()
    observation, info = joint.reset(seed=1)
    observations, infos = team.reset(seed=1)
    assert observation.shape == (2 * len(LOCAL_FIELDS) + len(STATE_FIELDS),)
    rng = np.random.default_rng(0)
    while team.agents:
        expected = np.concatenate([observations["generator"], observations["discriminator"], team.state()])
        np.testing.assert_array_equal(observation, expected)
        assert info == infos["generator"]
        action = rng.uniform(-1, 1, 2).astype(np.float32)
        observation, reward, terminated, truncated, info = joint.step(action)
        observations, rewards, *_, infos = team.step({"generator": action[:1], "discriminator": action[1:]})
        assert reward == rewards["generator"]
        assert (terminated, truncated) == (not team.agents, False)


def test_joint_action_must_have_one_number_per_agent(make: MakeEnv) -> None:
    joint = JointPruningEnv(make())
    joint.reset()
    with pytest.raises(ValueError, match=r"shape \(2,\)"):
        joint.step(np.zeros(3, dtype=np.float32))
