"""The door between a PettingZoo team and stable-baselines3: one slot of a VecEnv per agent."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces
from numpy.typing import NDArray
from pettingzoo import ParallelEnv
from stable_baselines3.common.vec_env import VecEnv

from envs.observations import LOCAL_FIELDS, STATE_FIELDS, build_space

Observations = dict[str, NDArray[np.float32]]


class TeamVecEnv(VecEnv):
    """A cooperative ``ParallelEnv`` as an SB3 ``VecEnv`` with one slot per agent.

    Slot ``i`` observes ``Dict(local=<the agent's vector>, state=<the team's vector>)``, acts for agent
    ``i`` and is paid the team's reward. All slots start and end together, so each gets its own ratios
    and advantages while the trajectory is one. The episode's statistics (``info["episode"]``) stand in
    slot 0 alone: the team's return is one number, not one per agent.

    Args:
        env: agents with equal action and observation spaces, a ``state()``, and a fixed cast.

    Raises:
        ValueError: if the agents' spaces differ, or one agent is paid another reward than the rest.
    """

    def __init__(self, env: ParallelEnv) -> None:
        self.env = env
        self.slots: list[str] = list(env.possible_agents)
        local, action = env.observation_space(self.slots[0]), env.action_space(self.slots[0])
        for agent in self.slots[1:]:
            if env.observation_space(agent) != local or env.action_space(agent) != action:
                raise ValueError(
                    f"agents share one policy, so their spaces must be equal; {agent!r} has others"
                )
        self._actions: NDArray[np.float32] | None = None
        self._return, self._length = 0.0, 0
        super().__init__(len(self.slots), policy_space(local, env.state_space), action)

    def reset(self) -> Observations:
        """Start an episode; the seed and options set before are used up."""
        observations, infos = self.env.reset(seed=self._seeds[0], options=self._options[0] or None)
        self.reset_infos = [infos.get(agent, {}) for agent in self.slots]
        self._reset_seeds()
        self._reset_options()
        self._return, self._length = 0.0, 0
        return self._stack(observations)

    def step_async(self, actions: NDArray[np.float32]) -> None:
        """Keep the joint action, (slots, action size), for :meth:`step_wait`."""
        self._actions = actions

    def step_wait(self) -> tuple[Observations, NDArray[np.float32], NDArray[np.bool_], list[dict[str, Any]]]:
        """Step the team; at an episode's end start the next one, as SB3 expects."""
        assert self._actions is not None, "step_async comes first"
        actions = dict(zip(self.slots, self._actions, strict=True))
        observations, rewards, terminated, truncated, team_infos = self.env.step(actions)
        paid = np.array([rewards[agent] for agent in self.slots], dtype=np.float32)
        if np.any(paid != paid[0]):
            raise ValueError(f"a team shares one reward; got {rewards}")
        ended = [bool(terminated[agent] or truncated[agent]) for agent in self.slots]
        if any(ended) != all(ended):
            raise ValueError(
                f"a team starts and ends together; got terminated {terminated}, truncated {truncated}"
            )
        infos = [dict(team_infos[agent]) for agent in self.slots]
        self._return += float(rewards[self.slots[0]])
        self._length += 1
        stacked = self._stack(observations)
        if all(ended):
            for slot, (agent, info) in enumerate(zip(self.slots, infos, strict=True)):
                info["terminal_observation"] = {key: rows[slot] for key, rows in stacked.items()}
                info["TimeLimit.truncated"] = bool(truncated[agent] and not terminated[agent])
            infos[0]["episode"] = {"r": self._return, "l": self._length}
            stacked = self.reset()
        return stacked, paid, np.array(ended), infos

    def close(self) -> None:
        """Close the team's environment."""
        self.env.close()

    def get_attr(self, attr_name: str, indices: Any = None) -> list[Any]:
        """The environment's attribute, once per asked slot."""
        if attr_name == "render_mode" and not hasattr(self.env, attr_name):
            return [None for _ in self._get_indices(indices)]  # PettingZoo does not require it, SB3 warns
        return [getattr(self.env, attr_name) for _ in self._get_indices(indices)]

    def set_attr(self, attr_name: str, value: Any, indices: Any = None) -> None:
        """Set an attribute of the one environment behind all slots."""
        setattr(self.env, attr_name, value)

    def env_method(
        self, method_name: str, *method_args: Any, indices: Any = None, **method_kwargs: Any
    ) -> list[Any]:
        """Call a method once and give its result to each asked slot: the slots are one environment."""
        result = getattr(self.env, method_name)(*method_args, **method_kwargs)
        return [result for _ in self._get_indices(indices)]

    def env_is_wrapped(self, wrapper_class: type, indices: Any = None) -> list[bool]:
        """False per asked slot: Gymnasium wrappers do not fit a PettingZoo environment."""
        return [False for _ in self._get_indices(indices)]

    def _stack(self, observations: dict[str, NDArray[np.float32]]) -> Observations:
        return stack(self.slots, observations, self.env.state())


def stack(
    slots: Sequence[str], observations: dict[str, NDArray[np.float32]], state: NDArray[np.float32]
) -> Observations:
    """What a policy over ``Dict(local, state)`` sees: (agents, local size) and (agents, state size)."""
    local = np.stack([observations[agent] for agent in slots]).astype(np.float32)
    return {"local": local, "state": np.repeat(state[None].astype(np.float32), len(slots), axis=0)}


def policy_space(local: spaces.Space, state: spaces.Space) -> spaces.Dict:
    """The observation space of a policy: one agent's vector and the team's state."""
    return spaces.Dict({"local": local, "state": state})


def action_space() -> spaces.Box:
    """What an agent of the pruning environment does: one number in [-1, 1]."""
    return spaces.Box(-1.0, 1.0, (1,), np.float32)


class NormalBox(spaces.Box):
    """``Box(-1, 1, (size,))`` whose samples are N(0, std²), clipped: around uniform pruning.

    Args:
        size: numbers in an action.
        std: standard deviation of the samples.
    """

    def __init__(self, size: int, std: float) -> None:
        super().__init__(-1.0, 1.0, (size,), np.float32)
        self.std = std

    def sample(self, mask: None = None, probability: None = None) -> NDArray[np.float32]:
        """A random action."""
        draw = self.np_random.normal(0.0, self.std, self.shape)
        return np.clip(draw, self.low, self.high).astype(np.float32)


class Outline(gymnasium.Env[NDArray[np.float32], NDArray[np.float32]]):
    """An environment that is only its spaces: what a policy is built on when there is nothing to run."""

    def __init__(self, observation: spaces.Space, action: spaces.Space) -> None:
        self.observation_space, self.action_space = observation, action


def joint_outline(agents: int) -> Outline:
    """The spaces of a :class:`envs.joint_env.JointPruningEnv` of so many networks."""
    observation = build_space(*[LOCAL_FIELDS] * agents, STATE_FIELDS)
    return Outline(observation, spaces.Box(-1.0, 1.0, (agents,), np.float32))
