"""Searches in a second: the toy environment and few evaluations."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from agents.registry import build_agent
from envs.pruning_env import PruningEnv, Reward
from envs.records import Episode, Evaluation
from envs.toy import toy_env


class Recorder:
    """Keeps what a search asks for."""

    def __init__(self) -> None:
        self.plans: list[Evaluation] = []
        self.episodes: list[Episode] = []

    def on_plan(self, evaluation: Evaluation) -> None:
        self.plans.append(evaluation)

    def on_episode(self, episode: Episode) -> None:
        self.episodes.append(episode)

    @property
    def keys(self) -> list[str]:
        return [evaluation.plan.key for evaluation in self.plans]


Recorded = Callable[..., tuple[PruningEnv, Recorder]]


@pytest.fixture
def recorded() -> Recorded:
    """``recorded(evaluations, **options of toy_env)`` → an environment and what listens to it."""

    def build(evaluations: int | None = 24, **options: Any) -> tuple[PruningEnv, Recorder]:
        recorder = Recorder()
        return toy_env(evaluations, listener=recorder, **options), recorder

    return build


def best_scores(name: str, seeds: int, reward: Reward) -> list[float]:
    """What a learner of each seed 0, 1, … finds on the toy with 300 evaluations."""
    scores = []
    for seed in range(seeds):
        env = toy_env(300, reward)
        build_agent(name, seed).learn(env)
        assert env.best is not None
        scores.append(env.best.potential)
    return scores
