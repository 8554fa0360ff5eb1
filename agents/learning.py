"""What learners on stable-baselines3 share: an end, randomness of their own, and whom a policy fits."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from stable_baselines3.common.callbacks import BaseCallback

from agents.base import Agent
from agents.tensorboard import EpisodeLog
from envs.budget import LARGEST_MOVE
from envs.observations import LOCAL_FIELDS, STATE_FIELDS
from envs.pruning_env import PruningEnv, Reward
from gan.errors import UserError
from gan.evaluations import CountedScorer

WEIGHTS = "policy.safetensors"
"""The policy's tensors, in an agent's folder."""

LOCAL_NAMES = [field.name for field in LOCAL_FIELDS]
STATE_NAMES = [field.name for field in STATE_FIELDS]

GAE_LAMBDA: dict[Reward, float] = {"step": 0.5, "final": 0.9}
"""λ of generalised advantages by when the reward comes. Where the last step pays it all, the decision k
steps before hears of λ^k of it, and the critic has to tell the rest: with 0.5 the first of ten decisions
hears of 0.2 %, and policies settle early. See docs/results.md."""

ENDLESS = 2**40
"""Steps that SB3 may take: the evaluations end a search, not the steps."""


@contextmanager
def last_for_the_proposal(env: PruningEnv, agent: Agent, log: EpisodeLog) -> Iterator[None]:
    """Within it a search ends one evaluation early; after it, that one scores what its policy proposes.

    A policy is better than most of the episodes that it is sampled in, and now and then better than the best
    of them. A plan that was scored before costs nothing, and the evaluation is left. Where budgets are ranges
    there is no one plan to propose, and all evaluations go to the search.

    Args:
        env: its scorer has a limit.
        agent: can propose afterwards.
        log: takes it as the last episode.
    """
    scorer = env.scorer
    kept = scorer.limit
    if kept is None or not all(budget.fixed for budget in env.budgets.values()):
        yield
        return
    scorer.limit = kept - 1
    try:
        yield
    finally:
        scorer.limit = kept
    if not scorer.exhausted:
        proposed = env.evaluate(agent.propose(env))
        log.record(scorer.evaluations, proposed.potential, proposed.term_scores)


class Progress(BaseCallback):
    """Ends the search with its evaluations, and logs every finished episode once.

    Args:
        scorer: counts the evaluations.
        log: takes the episodes.
    """

    def __init__(self, scorer: CountedScorer, log: EpisodeLog) -> None:
        super().__init__()
        self.scorer = scorer
        self.log = log

    def _on_step(self) -> bool:
        info = self.locals["infos"][0]  # the team's numbers stand in every slot; one is enough
        if "episode" in info:
            self.log.record(self.scorer.evaluations, info["potential"], info["scores"])
        return not self.scorer.exhausted


@contextmanager
def private_randomness() -> Iterator[None]:
    """SB3 seeds Python, NumPy and torch globally: give everyone else their state back afterwards."""
    python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002 - SB3 uses the global one
    try:
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)  # noqa: NPY002


def describe_interface() -> dict[str, Any]:
    """What a policy's description says of what it sees and of what its actions do."""
    return {"local": LOCAL_NAMES, "state": STATE_NAMES, "largest_move": LARGEST_MOVE}


def check_interface(folder: Path, content: Mapping[str, Any]) -> None:
    """Refuse a policy that was trained on other observations, or whose actions did something else.

    Args:
        folder: where it lies.
        content: its description.

    Raises:
        UserError: with what differs.
    """
    for part, expected in (("local", LOCAL_NAMES), ("state", STATE_NAMES)):
        found = content.get(part)
        if found == expected:
            continue
        names = set(map(str, found)) if isinstance(found, list) else set()
        differ = sorted(names ^ set(expected))
        detail = f"they differ in {', '.join(differ)}" if differ else "they stand in another order"
        raise UserError(
            f"the policy in {folder} was trained on other {part} observations than this version gives: "
            f"{detail}; train it again"
        )
    move = content.get("largest_move")
    if move != LARGEST_MOVE:
        raise UserError(
            f"the largest action of the policy in {folder} changed a proportion by the factor "
            f"{move or 'unknown'}, here it is {LARGEST_MOVE:g}; train it again"
        )


def misfit(folder: Path, error: RuntimeError) -> UserError:
    """What to say of a saved policy whose tensors its network does not take.

    Args:
        folder: where it lies.
        error: of torch; its last line says what differs.
    """
    detail = str(error).splitlines()[-1].strip(" \t.")
    return UserError(f"the policy in {folder} does not fit its options: {detail}; train it again")


def batch_size(rows: int, minibatches: int) -> int:
    """Rows per minibatch: a divisor of all rows, at least 2, as near to the wish as there is."""
    divisors = [size for size in range(2, rows + 1) if rows % size == 0]
    return min(divisors, key=lambda size: abs(size - rows / minibatches))
