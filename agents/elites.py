"""PPO that remembers: the best episodes so far are imitated beside what the last rollout teaches.

A search is paid for its best plan, and PPO forgets it: an episode teaches in the update after it and never
again. Where good plans are rare, what they taught is soon drowned by the many poor ones, and the policy
settles on avoiding the worst. So the best episodes stay, and their actions are made more likely after every
update, as far as they were better than the critic expects: Oh et al., "Self-Imitation Learning", ICML 2018
(arXiv:1806.05635), with the few best episodes in the place of prioritised replay. What every search knows
beforehand stands in that memory from the start: pruning uniformly, and what comes of it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from stable_baselines3 import PPO
from stable_baselines3.common.buffers import DictRolloutBuffer
from stable_baselines3.common.callbacks import BaseCallback
from torch import Tensor, nn

from agents.base import rehearse
from agents.vec_env import TeamVecEnv, action_space
from envs.pruning_env import PruningEnv
from gan.evaluations import CountedScorer

SURPLUS_BOUND = 3.0
"""No step counts for more than so many standard deviations of a return."""
MINIBATCHES = 2
"""Parts of a pass over the imitated episodes."""
RECENT = 64
"""Episodes whose returns give the unit of a surplus."""
MOST = 256
"""Episodes that are remembered; of more, the best stay."""


class Remembered(NamedTuple):
    """An episode of the team, its steps and slots in one row.

    Attributes:
        observations: part → (steps · slots, size); the first row is the start.
        actions: (steps · slots, action size).
        returns: (steps · slots,) rewards from each step to the end.
    """

    observations: dict[str, Tensor]
    actions: Tensor
    returns: Tensor

    @property
    def total(self) -> float:
        """Return of the episode."""
        return float(self.returns[0])


class ElitePPO(PPO):
    """PPO of SB3 over whole undiscounted episodes that also imitates the best of them.

    The best are those whose return exceeds most what the critic now expects at their start. Under one budget
    that is the highest return; where budgets differ, an easy one does not take all the places.

    Args:
        args: as of SB3's PPO; ``n_steps`` must be a multiple of the horizon.
        horizon: steps of every episode.
        elites: episodes that are imitated, ≥ 0.
        imitation: passes over them after each update.
        options: as of SB3's PPO.
    """

    rollout_buffer: DictRolloutBuffer

    def __init__(self, *args: Any, horizon: int, elites: int, imitation: int, **options: Any) -> None:
        self.horizon, self.elites, self.imitation = horizon, elites, imitation
        self.episodes: list[Remembered] = []
        self._recent: deque[float] = deque(maxlen=RECENT)  # returns
        super().__init__(*args, **options)

    @property
    def imitates(self) -> bool:
        """Whether episodes are remembered at all."""
        return bool(self.elites and self.imitation)

    def train(self) -> None:
        """PPO's update, then imitation."""
        if self.imitates:
            finished = self._finished()  # before PPO shuffles its buffer
            self.episodes += finished
            self._recent.extend(episode.total for episode in finished)
        super().train()
        if self.episodes:
            ranked = self.best(len(self.episodes))
            self._imitate(ranked[: self.elites])
            if len(ranked) > MOST:
                self.episodes = ranked[:MOST]

    def best(self, count: int) -> list[Remembered]:
        """The remembered episodes that exceed most what the critic expects at their start, the best first."""
        parts = self.episodes[0].observations
        starts = {part: torch.stack([e.observations[part][0] for e in self.episodes]) for part in parts}
        with torch.no_grad():
            expected = self.policy.predict_values(starts).flatten()
        surplus = torch.tensor([episode.total for episode in self.episodes]) - expected
        return [self.episodes[place] for place in surplus.argsort(descending=True, stable=True)[:count]]

    def _finished(self) -> list[Remembered]:
        """The episodes of the rollout buffer."""
        buffer, horizon = self.rollout_buffer, self.horizon
        found = []
        for begin in range(0, buffer.buffer_size, horizon):
            rows = slice(begin, begin + horizon)
            rewards = torch.as_tensor(buffer.rewards[rows])  # (steps, slots)
            found.append(
                Remembered(
                    {part: _row(values[rows]) for part, values in buffer.observations.items()},
                    _row(buffer.actions[rows]),
                    _returns(rewards),
                )
            )
        return found

    def _imitate(self, episodes: Sequence[Remembered]) -> None:
        """Make what was done in some episodes more likely; the critic stays as it is."""
        parts = episodes[0].observations
        observations = {part: torch.cat([e.observations[part] for e in episodes]) for part in parts}
        actions = torch.cat([episode.actions for episode in episodes])
        returns = torch.cat([episode.returns for episode in episodes])
        unit = torch.tensor(list(self._recent)).std(correction=0)
        with torch.no_grad():
            surplus = returns - self.policy.predict_values(observations).flatten()
        weights = (surplus / unit.clamp(min=1e-6)).clamp(0.0, SURPLUS_BOUND)
        self.policy.set_training_mode(True)
        for _ in range(self.imitation):
            for rows in torch.randperm(len(actions)).chunk(MINIBATCHES):
                seen = {part: values[rows] for part, values in observations.items()}
                _, log_likelihood, _ = self.policy.evaluate_actions(seen, actions[rows])
                loss = -(weights[rows] * log_likelihood).mean()
                self.policy.optimizer.zero_grad()
                loss.backward()  # type: ignore[no-untyped-call]
                nn.utils.clip_grad_norm_(self.policy.parameters(), self.max_grad_norm)
                self.policy.optimizer.step()
        self.logger.record("train/imitated_return", sum(e.total for e in episodes) / len(episodes))


def uniform_episode(env: PruningEnv, seed: int) -> Remembered:
    """The episode of a team that keeps to uniform pruning: where a memory begins.

    It costs no evaluation, since every search knows what uniform pruning scores. A policy whose first few
    episodes are all worse is led back by it, where the best of them would lead it astray. Where budgets are
    ranges it is the episode of one draw of them; what is uniform under one is uniform under all.

    Args:
        env: what is searched in.
        seed: of the budgets, where they are ranges.
    """
    team = TeamVecEnv(rehearse(env))
    team.seed(seed)
    seen, rewards = [team.reset()], []
    actions = np.zeros((env.horizon, team.num_envs, *action_space().shape), np.float32)
    for action in actions:
        team.step_async(action)
        observations, paid, *_ = team.step_wait()
        seen.append(observations)
        rewards.append(paid)
    return Remembered(
        {part: _row(np.stack([step[part] for step in seen[:-1]])) for part in seen[0]},
        _row(actions),
        _returns(torch.as_tensor(np.stack(rewards))),
    )


def _returns(rewards: Tensor) -> Tensor:
    """(steps, slots) rewards → (steps · slots,) their sums from each step to the end."""
    return rewards.flip(0).cumsum(0).flip(0).flatten()


def _row(values: Any) -> Tensor:
    """(steps, slots, size) → a copy as (steps · slots, size)."""
    return torch.as_tensor(values).flatten(0, 1).clone()


class WideBeginning(BaseCallback):
    """Lets actions vary more, and all alike, while a search is young.

    What it changes it changes between rollouts, as PPO's ratios want it.

    Args:
        scorer: counts the evaluations; it must have a limit.
        share: of the evaluations during which actions vary more, in [0, 1].
        wide: their standard deviation to begin with; what is learned narrows it.
        narrow: what it is set to afterwards; from there on it is learned.
    """

    def __init__(self, scorer: CountedScorer, share: float, wide: float, narrow: float) -> None:
        super().__init__()
        self.scorer, self.share, self.wide, self.narrow = scorer, share, wide, narrow
        self._exploring = share > 0

    def _on_training_start(self) -> None:
        if self._exploring:
            self._set(self.wide)
            self.model.policy.learn_state_std(False)  # type: ignore[operator]

    def _on_rollout_start(self) -> None:
        limit = self.scorer.limit
        if self._exploring and limit is not None and self.scorer.evaluations >= self.share * limit:
            self._set(self.narrow)
            self.model.policy.learn_state_std(True)  # type: ignore[operator]
            self._exploring = False

    def _on_step(self) -> bool:
        return True

    def _set(self, deviation: float) -> None:
        with torch.no_grad():
            self.model.policy.log_std.fill_(torch.tensor(deviation).log())  # type: ignore[union-attr, operator]
