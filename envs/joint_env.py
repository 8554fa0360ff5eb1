"""The Gymnasium view: one controller moves all networks at once."""

from __future__ import annotations

from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces
from numpy.typing import NDArray

from envs.observations import LOCAL_FIELDS, STATE_FIELDS, build_space
from envs.pruning_env import PruningEnv

Vector = NDArray[np.float32]


class JointPruningEnv(gymnasium.Env[Vector, Vector]):
    """A :class:`PruningEnv` as a single-agent environment, for any off-the-shelf learner.

    The action is the actions of all agents, in their order: ``Box(-1, 1, (n_agents,), float32)``. The
    observation is their local vectors, in the same order, then the state. Reward and episode end are the
    team's. ``info`` is that of one agent (they are equal). ``reset`` passes seed and options on.

    Attributes:
        pruning: the environment behind it.
    """

    def __init__(self, pruning: PruningEnv) -> None:
        """Wrap a ready environment."""
        self.pruning = pruning
        agents = len(pruning.possible_agents)
        # gymnasium types every Box as one of any number
        self.action_space = spaces.Box(-1.0, 1.0, (agents,), np.float32)  # type: ignore[assignment]
        self.observation_space = build_space(*[LOCAL_FIELDS] * agents, STATE_FIELDS)  # type: ignore[assignment]

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Vector, dict[str, Any]]:
        """Start an episode from the uniform plan."""
        super().reset(seed=seed)
        observations, infos = self.pruning.reset(seed=seed, options=options)
        return self._join(observations), infos[self.pruning.possible_agents[0]]

    def step(self, action: Vector) -> tuple[Vector, float, bool, bool, dict[str, Any]]:
        """Move one group of every network.

        Args:
            action: (n_agents,) in [-1, 1].

        Raises:
            ValueError: if the action has another shape or is not finite.
        """
        agents = self.pruning.possible_agents
        action = np.asarray(action)
        if action.shape != self.action_space.shape:
            raise ValueError(
                f"the action must have shape {self.action_space.shape}, one number for each of {agents}; "
                f"got {action.shape}"
            )
        actions = {agent: action[i : i + 1] for i, agent in enumerate(agents)}
        observations, rewards, terminated, truncated, infos = self.pruning.step(actions)
        first = agents[0]
        return self._join(observations), rewards[first], terminated[first], truncated[first], infos[first]

    def _join(self, observations: dict[str, Vector]) -> Vector:
        ordered = [observations[agent] for agent in self.pruning.possible_agents]
        return np.concatenate([*ordered, self.pruning.state()])
