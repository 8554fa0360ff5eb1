from __future__ import annotations

import gymnasium
import numpy as np
import pytest
from stable_baselines3 import PPO
from stable_baselines3.common.policies import MultiInputActorCriticPolicy

from agents.vec_env import TeamVecEnv, action_space
from envs.toy import toy_env
from tests.agents.conftest import Recorded


@pytest.fixture
def slots() -> TeamVecEnv:
    return TeamVecEnv(toy_env())


def test_slots_are_the_agents_and_share_the_state(slots: TeamVecEnv) -> None:
    observations = slots.reset()
    assert slots.num_envs == len(slots.slots) == 2
    assert slots.action_space == action_space()
    for slot, agent in enumerate(slots.slots):
        row = {key: value[slot] for key, value in observations.items()}
        assert slots.observation_space.contains(row)
        assert row["local"][0] == (agent == "discriminator")
    np.testing.assert_array_equal(observations["state"][0], observations["state"][1])
    np.testing.assert_array_equal(observations["state"][0], slots.env.state())


def test_an_episode_equals_the_environments_own(slots: TeamVecEnv) -> None:
    twin = toy_env()
    rng = np.random.default_rng(0)
    slots.seed(5)
    slots.reset()
    twin.reset(seed=5)
    for step in range(slots.env.horizon):
        actions = rng.uniform(-1, 1, (2, 1)).astype(np.float32)
        observations, rewards, dones, infos = slots.step(actions)
        expected, team, terminated, _, team_infos = twin.step(dict(zip(slots.slots, actions, strict=True)))
        last = step == slots.env.horizon - 1
        assert dones.tolist() == [last, last] == list(terminated.values())
        np.testing.assert_array_equal(rewards, np.float32(list(team.values())))
        for slot, agent in enumerate(slots.slots):
            seen = (
                infos[slot]["terminal_observation"] if last else {k: v[slot] for k, v in observations.items()}
            )
            np.testing.assert_array_equal(seen["local"], expected[agent])
            np.testing.assert_array_equal(seen["state"], twin.state())
            assert infos[slot]["potential"] == team_infos[agent]["potential"]


def test_an_episodes_end_is_no_truncation_and_counts_once(slots: TeamVecEnv) -> None:
    first = slots.reset()
    paid = 0.0
    for _ in range(slots.env.horizon):
        observations, rewards, dones, infos = slots.step(np.full((2, 1), 0.5, dtype=np.float32))
        paid += float(rewards[0])
    assert dones.all()
    assert [info["TimeLimit.truncated"] for info in infos] == [False, False]
    assert ["episode" in info for info in infos] == [True, False]
    assert infos[0]["episode"]["l"] == slots.env.horizon
    assert infos[0]["episode"]["r"] == pytest.approx(paid, abs=1e-5)
    assert infos[0]["episode"]["r"] == pytest.approx(infos[0]["potential"])
    for key in first:  # the next episode has begun
        np.testing.assert_array_equal(observations[key], first[key])


def test_the_seed_reaches_the_draw_of_budgets() -> None:
    drawn = []
    for seed in (1, 1, 2):
        slots = TeamVecEnv(toy_env(budgets={"generator": "0.05:0.5"}))
        slots.seed(seed)
        slots.reset()
        drawn.append(slots.env.episode_budgets["generator"])
    assert drawn[0] == drawn[1] != drawn[2]


def test_ppo_takes_it_with_a_seed(slots: TeamVecEnv) -> None:
    ppo = PPO(MultiInputActorCriticPolicy, slots, n_steps=5, batch_size=5, n_epochs=1, seed=0, device="cpu")
    ppo.learn(20)
    assert ppo.num_timesteps == 20
    assert len(ppo.ep_info_buffer) == 2  # one per episode, not one per slot


def test_the_environment_is_reachable_through_every_slot(slots: TeamVecEnv, recorded: Recorded) -> None:
    assert slots.get_attr("horizon") == [slots.env.horizon] * 2
    assert slots.get_attr("horizon", indices=[1]) == [slots.env.horizon]
    assert slots.get_attr("render_mode") == [None, None]
    assert not slots.has_attr("no_such_thing")
    slots.set_attr("listener", recorded()[1])
    assert slots.env.listener is not None
    assert slots.env_method("uniform_plan", indices=0) == [slots.env.uniform_plan()]
    assert slots.env_is_wrapped(gymnasium.Wrapper) == [False, False]
    slots.close()


def test_a_team_that_is_paid_apart_is_refused(slots: TeamVecEnv, monkeypatch: pytest.MonkeyPatch) -> None:
    slots.reset()
    step = slots.env.step

    def unfair(actions: dict[str, np.ndarray]) -> tuple:
        observations, rewards, *rest = step(actions)
        return observations, rewards | {"discriminator": 7.0}, *rest

    monkeypatch.setattr(slots.env, "step", unfair)
    with pytest.raises(ValueError, match="shares one reward"):
        slots.step(np.zeros((2, 1), dtype=np.float32))
